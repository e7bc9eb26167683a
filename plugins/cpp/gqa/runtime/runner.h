// One run of an engine: what lies where on the GPU, one profile for prompts and one for single tokens.
//
// Owns the cache and every input and output; present tensors are bound to the memory of the past ones. Lengths are the
// caller's (Session): a Runner checks nothing.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gqa/cuda/memory.h"
#include "gqa/runtime/communicator.h"
#include "gqa/runtime/engine.h"
#include "gqa/runtime/manifest.h"

namespace gqa {

// The new tokens of every row, padded on the right to `steps`.
struct Feed {
    std::int64_t batch, steps;
    std::vector<std::int32_t> ids;  // [batch, steps]
    std::vector<std::int32_t> past_lengths, new_lengths;
};

class Runner {
public:
    using Log = std::function<void(std::string const&)>;
    // communicator: of an engine of several ranks, all of which make their Runners at once; else null.
    Runner(Manifest const& manifest, std::unique_ptr<Engine> engine, bool cuda_graph, Log log,
           std::shared_ptr<Communicator> communicator = nullptr);
    ~Runner();

    // Runs and waits. Returns [batch, vocabulary] logits in the engine's own number format, valid until the next run.
    void const* run(Feed const& feed);
    Number logits_number() const { return logits_number_; }

    void zero_cache();
    // The first `tokens` tokens of every cache, from one row to another; of a shorter one, a ring, all.
    void copy_row(std::int64_t from, std::int64_t to, std::int64_t tokens);
    // Zeroes a row's caches from token `begin` on.
    void zero_row(std::int64_t row, std::int64_t begin);

private:
    struct Profile {
        std::shared_ptr<EngineContext> context;
        std::int64_t batch = 0, steps = 0;
    };

    // Calls work(address of the row's first head, heads, bytes of a head, bytes of a token) for every cache.
    template <typename Work>
    void each_cache(std::int64_t row, Work work) const;
    Profile open(int index);
    void join();
    void wait();
    void set_shapes(Profile& profile, Feed const& feed);
    void fill_host(Feed const& feed);
    void enqueue(Profile& profile, std::int64_t batch, std::int64_t steps);
    void run_captured(std::int64_t batch);

    Manifest const& manifest_;
    Log log_;
    bool cuda_graph_;
    Number ids_number_, logits_number_;
    std::shared_ptr<Communicator> communicator_;  // outlives the contexts that have it
    std::shared_ptr<Engine> engine_;
    cuda::OwnedStream stream_;
    std::map<std::string, cuda::DeviceMemory> memory_;  // by the name of an input, "logits" and "hidden_states"
    cuda::PinnedMemory ids_, past_lengths_, new_lengths_, logits_;
    Profile decode_, prefill_;
    std::optional<cuda::CapturedGraph> graph_;  // of a decode step at decode_.batch
};

}  // namespace gqa
