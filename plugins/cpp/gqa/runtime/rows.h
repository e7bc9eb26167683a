// The rows of a batch: how long each is, what may be added, and the runs that add it. Inside of Session.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gqa/cuda/memory.h"
#include "gqa/runtime/runner.h"
#include "gqa/runtime/session.h"

namespace gqa {

class Session::Rows {
public:
    Rows(Manifest manifest, std::unique_ptr<cuda::DeviceContext> device, std::unique_ptr<Engine> engine,
         Options const& options);

    Manifest const& manifest() const { return manifest_; }
    std::vector<std::int64_t> const& lengths() const { return lengths_; }
    std::uint64_t shared_seed(std::uint64_t seed);

    // Each throws Error; nothing has run then.
    void check_batch(std::size_t rows) const;
    void check_token(std::size_t row, Token token) const;
    // Whether `more`, and `reserve` tokens after it, fit behind `before` tokens of every row.
    void check_fits(std::vector<std::int64_t> const& before, std::vector<Tokens> const& more,
                    std::int64_t reserve) const;

    void forget(std::size_t rows);
    // Lets row `to` begin with the first `length` tokens of row `from`, which may be the same.
    void keep(std::size_t from, std::size_t to, std::int64_t length);
    Logits extend(std::vector<Tokens> const& more);

private:
    // The least length, beside 0, at which all that a row would see is there: rings keep a window and a prompt chunk.
    std::int64_t least_length(std::size_t row) const;
    void const* run(Feed const& feed);
    Feed cut_out(std::vector<Tokens> const& more, std::size_t begin, std::size_t steps,
                 std::vector<std::int64_t> const& lengths) const;
    void copy_logits(void const* raw, std::size_t row, Logits& logits) const;

    Manifest const manifest_;
    std::unique_ptr<cuda::DeviceContext> device_;  // outlives everything on it
    std::shared_ptr<Communicator> communicator_;   // of a bundle that is cut over ranks; else null
    Runner runner_;
    std::vector<std::int64_t> lengths_;
    std::vector<std::int64_t> ends_;  // of what each row ever wrote: a ring holds what went back, too
};

std::function<void(std::string const&)> log_of(Options const& options);

}  // namespace gqa
