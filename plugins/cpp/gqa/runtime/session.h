// A conversation with an engine: tokens in, logits out, the cache kept on the GPU between calls.
//
// Use one Session from one thread at a time. All errors are gqa::Error: what, where, fix. What would not fit into the
// cache is refused before anything runs, and the session stays as it was.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gqa/core/error.h"
#include "gqa/runtime/communicator.h"
#include "gqa/runtime/engine.h"
#include "gqa/runtime/manifest.h"

namespace gqa {

using Token = std::int32_t;
using Tokens = std::vector<Token>;

struct Options {
    int device = 0;
    std::string plugin_library;  // path of libgqa_plugin.so; needed by engines with the plugin only
    bool cuda_graph = true;      // decode steps are captured once and replayed
    std::function<void(std::string const&)> log;  // warnings; absent: standard error
    // Of a bundle that is cut over ranks, this rank's; every rank must make the same calls with the same tokens. When one
    // fails, the others' calls end with an Error, and none of their sessions can go on.
    std::shared_ptr<Communicator> communicator;
};

// The logits of each row's last token, as fp32 on the host.
class Logits {
public:
    Logits(std::size_t rows, std::size_t vocabulary) : vocabulary_(vocabulary), values_(rows * vocabulary) {}

    std::size_t rows() const { return vocabulary_ ? values_.size() / vocabulary_ : 0; }
    std::size_t vocabulary() const { return vocabulary_; }
    float* row(std::size_t index) { return values_.data() + index * vocabulary_; }
    float const* row(std::size_t index) const { return values_.data() + index * vocabulary_; }
    Token best(std::size_t index) const;  // the most likely token; the first of several equal ones

private:
    std::size_t vocabulary_;
    std::vector<float> values_;
};

struct GenerateOptions {
    std::int64_t max_new_tokens = 128;
    Tokens end_tokens;  // empty: those of the manifest
    // Chooses a row's next token from its logits; absent: the most likely one.
    std::function<Token(std::size_t row, float const* logits, std::size_t vocabulary)> choose;
    // Called with every new token, the end token included; return false to stop the row.
    std::function<bool(std::size_t row, Token)> on_token;
};

class Session {
public:
    // Reads, checks and loads an engine bundle. Throws Error with the fix for whatever does not fit this machine.
    static Session load(std::string const& folder, Options const& options = {});

    // For an engine that is already loaded, on the device whose context is current. manifest: of this rank.
    Session(Manifest manifest, std::unique_ptr<Engine> engine, Options const& options = {});
    ~Session();
    Session(Session&&) noexcept;
    Session& operator=(Session&&) noexcept;

    Manifest const& manifest() const;
    std::vector<std::int64_t> const& lengths() const;  // tokens in the cache, per row
    // Rank 0's seed, on every rank, so that all draw the same tokens from the same logits; without ranks the seed itself.
    std::uint64_t shared_seed(std::uint64_t seed);

    // Forgets what was there and reads one prompt per row, of any lengths; returns each row's next-token logits.
    // Prompts longer than the engine's longest are read in several runs.
    Logits prefill(std::vector<Tokens> const& prompts);

    // Reads more tokens into the rows that are there; a row may get none (its logits are then 0).
    Logits extend(std::vector<Tokens> const& more);

    // One token per row. `no_token` leaves a row as it is (its logits are then 0).
    static constexpr Token no_token = -1;
    Logits step(Tokens const& tokens);

    // Rows as slots, for a scheduler whose requests join and leave one by one.
    // A batch of `rows` empty rows: feed them with extend or step, each whenever it has tokens.
    void open(std::size_t rows);
    // Empties one row; the others stay as they are.
    void reset_row(std::size_t row);
    // Keeps the first `length` tokens of a row and forgets the others; nothing is run again. Where windowed layers keep
    // rings (manifest().prompt_chunk), it goes back to 0, or a prompt chunk behind its farthest token and no farther.
    void rewind_row(std::size_t row, std::int64_t length);
    // Lets row `to` begin with the first `length` tokens of row `from` (whole_row: all of them).
    static constexpr std::int64_t whole_row = -1;
    void copy_row(std::size_t from, std::size_t to, std::int64_t length = whole_row);

    // Prompts in, new tokens out (without the prompt, end token included).
    std::vector<Tokens> generate(std::vector<Tokens> const& prompts, GenerateOptions const& options = {});

private:
    class Rows;

    Session();
    static std::unique_ptr<Rows> open_rows(std::string const& folder, Options const& options);
    Logits begin(std::vector<Tokens> const& prompts, std::int64_t reserve);

    std::unique_ptr<Rows> rows_;
};

}  // namespace gqa
