// The kernels to build an engine with: the .gqacubin files of the folder that GQA_KERNELS names.
//
// `gqa-export trt` builds through Python and needs none of this. It is for building from C++ (or with trtexec): compile
// the kernels first, `python -m gqa_plugins.grouped_attention.cubin ... --out FOLDER`, then set GQA_KERNELS=FOLDER.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gqa/attention/container.h"
#include "gqa/attention/layer.h"

namespace gqa::plugin {

class BuildKernels {
public:
    explicit BuildKernels(std::string const& folder);  // throws Error for an unreadable folder or a damaged file

    // The keys of a layer, for every capability there is a file for. Throws Error if a kernel is missing.
    std::vector<Key> keys_of(Layer const& layer, Sizes const& sizes) const;
    std::string const& container() const { return container_; }

    // Empty where GQA_KERNELS is not set. Read again only where the folder changed. They go into the process's store
    // too, because TensorRT times layers while it builds. Safe from any thread.
    static std::shared_ptr<BuildKernels const> from_environment();

private:
    std::string folder_, container_;
    std::map<std::string, Cubin> cubins_;  // by sha256 of the file
};

// Chooses the layer that carries the kernels of an engine: the first to be serialized since one was configured.
// Why so: `Carriers` in plugins/grouped_attention/plugin_layer.py.
class Carriers {
public:
    // A layer is configured: a build goes on.
    void configure();
    // Whether a layer that is serialized now, for the first time since it was configured, is the one.
    bool choose();

private:
    std::mutex lock_;
    std::uint64_t configured_ = 0;
    std::map<std::thread::id, std::uint64_t> carried_;
};

}  // namespace gqa::plugin
