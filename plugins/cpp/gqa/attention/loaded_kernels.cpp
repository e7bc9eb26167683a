#include "gqa/attention/loaded_kernels.h"

#include <mutex>
#include <utility>

#include "gqa/core/error.h"

namespace gqa {
namespace {

constexpr int kSharedBytesWithoutAsking = 48 * 1024;

using ModuleKey = std::pair<std::uint64_t, std::string>;  // the context's id, sha256 of the kernel's file

std::shared_ptr<LoadedKernel> load_once(LiveContext context, std::string const& sha256, Cubin const& cubin) {
    ModuleKey const key{context.id, sha256};
    static std::mutex* const lock = new std::mutex;  // engines may be torn down after static objects are
    static auto* const loaded = new std::map<ModuleKey, std::weak_ptr<LoadedKernel>>;
    std::lock_guard const guard(*lock);
    if (auto kernel = (*loaded)[key].lock()) return kernel;
    auto kernel = std::make_shared<LoadedKernel>(cubin, context);
    (*loaded)[key] = kernel;
    return kernel;
}

}  // namespace

LiveContext current_context() {
    LiveContext context;
    cuda::check(cuda::driver().context_get_current(&context.handle), "asking for the current CUDA context");
    if (!context.handle) {
        throw Error("no CUDA context is current on this thread", "the attention layers",
                    "load and run the engine on a thread whose CUDA device is set");
    }
    unsigned long long id = 0;
    cuda::check(cuda::driver().context_get_id(context.handle, &id), "asking for the CUDA context's id");
    context.id = id;
    return context;
}

LoadedKernel::LoadedKernel(Cubin const& cubin, LiveContext context) : context_(context) {
    auto const& driver = cuda::driver();
    cuda::check(driver.module_load_data(&module_, cubin.code.data()), ("loading kernel " + cubin.kernel).c_str());
    try {
        cuda::check(driver.module_get_function(&function_, module_, cubin.name.c_str()),
                    ("finding kernel " + cubin.name).c_str());
        if (cubin.shared_bytes > kSharedBytesWithoutAsking) {
            cuda::check(driver.function_set_attribute(function_, cuda::kMaxDynamicSharedBytes, cubin.shared_bytes),
                        ("raising the shared memory of kernel " + cubin.kernel).c_str());
        }
    } catch (...) {
        driver.module_unload(module_);
        throw;
    }
}

LoadedKernel::~LoadedKernel() {
    // A context that is gone took its modules along: then there is nothing left to do. Its address may be another's.
    auto const& driver = cuda::driver();
    unsigned long long id = 0;
    if (driver.context_get_id(context_.handle, &id) != cuda::kSuccess || id != context_.id) return;
    cuda::Context before = nullptr;
    if (driver.context_get_current(&before) != cuda::kSuccess) return;
    if (driver.context_set_current(context_.handle) != cuda::kSuccess) return;
    driver.module_unload(module_);
    driver.context_set_current(before);
}

LoadedLayer::LoadedLayer(Layer const& layer, Sizes const& sizes, std::vector<Key> const& keys,
                         CubinStore const& store)
    : context_(current_context()), kind_(sizes.kind) {
    cuda::Device device = 0;
    cuda::check(cuda::driver().context_get_device(&device), "asking for the current GPU");
    auto const facts = cuda::device_facts(device);
    sm_count_ = facts.sm_count;
    auto const picked = pick(keys, facts.capability);
    auto load = [&](char const* name) {
        auto const found = picked.find(name);
        if (found == picked.end()) {
            throw Error(std::string("the engine names no ") + name + " kernel", "plugin field keys",
                        "build the engine again with `gqa-export trt`");
        }
        auto const& sha256 = found->second.sha256;
        Kernel kernel = resolve(store.get(sha256));
        check_cubin(*kernel.cubin, layer, sizes);
        kernel.loaded = load_once(context_, sha256, *kernel.cubin);
        return kernel;
    };
    if (layer.appends()) kernels_.append = load("append");
    kernels_.prefill = load("prefill");
    kernels_.decode = load("decode");
    kernels_.combine = load("combine");
    if (layer.method) {
        kernels_.score = load("score");
        kernels_.select = load("select");
        kernels_.long_prefill = load("long_prefill");
    }
}

void LoadedLayer::enqueue(Layer const& layer, Sizes const& sizes,
                          std::array<std::uint64_t, kInputCount> const& pointers, std::uint64_t output,
                          std::uint64_t workspace, cuda::Stream stream) const {
    if (sizes.batch == 0 || sizes.steps == 0) return;
    Launches const launches(layer, sizes, kernels_, pointers, output, workspace, sm_count_);
    std::uint64_t const nothing = 0;  // the hidden scratch pointers
    for (Launch const& launch : launches) {
        Cubin const& cubin = *launch.kernel->cubin;
        std::array<void*, kSlotCount + 8> parameters{};
        std::size_t count = 0;
        auto add = [&](std::uint64_t const& word) { parameters.at(count++) = const_cast<std::uint64_t*>(&word); };
        for (Slot slot : launch.kernel->slots) add((*launch.arguments)[slot]);
        for (int i = 0; i < cubin.scratch_pointers; ++i) add(nothing);
        cuda::check(cuda::driver().launch_kernel(launch.kernel->loaded->function(), launch.grid[0],
                                                 launch.grid[1], launch.grid[2], static_cast<unsigned>(cubin.threads), 1, 1,
                                                 static_cast<unsigned>(cubin.shared_bytes), stream, parameters.data(),
                                                 nullptr),
                    ("launching kernel " + cubin.kernel).c_str());
    }
}

}  // namespace gqa
