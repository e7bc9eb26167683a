// Kernels on a GPU: modules loaded into a CUDA context, and their launch.
#pragma once

#include <memory>

#include "gqa/attention/launch.h"
#include "gqa/cuda/driver.h"

namespace gqa {

// A CUDA context. The driver may put a new one at the address of one that is gone; no two have the same id.
struct LiveContext {
    cuda::Context handle = nullptr;
    std::uint64_t id = 0;
};
LiveContext current_context();  // throws Error where none is

// One kernel, loaded. Shared by all layers of a context that launch it; unloaded with the last of them.
class LoadedKernel {
public:
    LoadedKernel(Cubin const& cubin, LiveContext context);
    ~LoadedKernel();
    LoadedKernel(LoadedKernel const&) = delete;
    LoadedKernel& operator=(LoadedKernel const&) = delete;

    cuda::Function function() const { return function_; }

private:
    LiveContext context_;
    cuda::Module module_ = nullptr;
    cuda::Function function_ = nullptr;
};

// A layer's kernels in the current CUDA context, and the launches of its calls.
class LoadedLayer {
public:
    // Loads what is not loaded yet. Call it before a CUDA graph is captured. Throws Error.
    LoadedLayer(Layer const& layer, Sizes const& sizes, std::vector<Key> const& keys, CubinStore const& store);

    // Launches on `stream`, asynchronously: nothing is allocated, nothing is waited for.
    void enqueue(Layer const& layer, Sizes const& sizes, std::array<std::uint64_t, kInputCount> const& pointers,
                 std::uint64_t output, std::uint64_t workspace, cuda::Stream stream) const;

    bool is_for(LiveContext context, Kind kind) const { return context.id == context_.id && kind == kind_; }

private:
    LiveContext context_;
    Kind kind_;
    int sm_count_ = 0;
    Kernels kernels_;
};

}  // namespace gqa
