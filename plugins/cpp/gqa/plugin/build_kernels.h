// The kernels to build an engine with: the .gqacubin files of the folder that GQA_KERNELS names.
//
// `gqa-export trt` builds through Python and needs none of this. It is for building from C++ (or with trtexec): compile
// the kernels first, `python -m gqa_plugins.grouped_attention.cubin ... --out FOLDER`, then set GQA_KERNELS=FOLDER.
#pragma once

#include <map>
#include <memory>
#include <string>
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

    static std::shared_ptr<BuildKernels const> from_environment();  // empty where GQA_KERNELS is not set

private:
    std::string folder_, container_;
    std::map<std::string, Cubin> cubins_;  // by sha256 of the file
};

// One engine's layers, in the order of their creation: the first carries the kernels of all.
class CarrierSeries {
public:
    // Whether the layer of this name is the first of a new network: it is if the name comes again.
    bool begins_with(std::string const& layer);

private:
    std::vector<std::string> names_;
};

}  // namespace gqa::plugin
