// Whether this machine can run what a manifest describes. Every mismatch is an Error with its fix.
#include <algorithm>
#include <fstream>

#include "gqa/attention/layer.h"
#include "gqa/core/error.h"
#include "gqa/core/sha256.h"
#include "gqa/runtime/manifest.h"

namespace gqa {
namespace {

std::string product(std::string const& flavor) { return flavor == "rtx" ? "TensorRT-RTX" : "TensorRT"; }

std::string dotted(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// "11.1.0.106" -> "11.1.0": engines do not depend on the build number.
std::string release(std::string const& version) {
    std::size_t end = 0;
    for (int part = 0; part < 3 && end != std::string::npos; ++part) end = version.find('.', end + (part > 0));
    return version.substr(0, end);
}

}  // namespace

void check_flavor_and_version(Manifest const& manifest, std::string const& flavor, std::string const& version,
                              std::string const& folder) {
    if (manifest.flavor != flavor) {
        throw Error("the engine was built by " + product(manifest.flavor) + ", this program runs with " +
                        product(flavor), folder,
                    "build it with `gqa-export trt BUNDLE -o DIR --flavor " + flavor +
                        "`, or compile this program with TensorRT_ROOT pointing to " + product(manifest.flavor));
    }
    if (release(manifest.version) != release(version)) {
        throw Error("the engine was built by " + product(flavor) + " " + manifest.version + ", this machine has " +
                        version, folder,
                    "install " + product(flavor) + " " + release(manifest.version) +
                        ", or build the engine again here with `gqa-export trt BUNDLE -o DIR`");
    }
}

void check_capability(Manifest const& manifest, int capability, std::string const& folder) {
    auto const& known = manifest.capabilities;
    if (known.empty() || std::find(known.begin(), known.end(), capability) != known.end()) return;
    std::string list;
    for (int one : known) list += (list.empty() ? "" : ", ") + dotted(one);
    throw Error("this GPU has compute capability " + dotted(capability) + ", the engine was built for " + list, folder,
                "build it with `gqa-export trt BUNDLE -o DIR --compute-capability " + dotted(capability) + "`");
}

void check_plugin(Manifest const& manifest, std::string const& library, std::string const& folder) {
    if (!manifest.plugin) return;
    PluginFact const& plugin = *manifest.plugin;
    std::int32_t const version = version_number(plugin.version);
    if (plugin.name != kPluginName || plugin.space != kPluginNamespace || !version ||
        plugin.contract_version != contract_of(version)) {
        throw Error("the engine needs plugin " + plugin.space + "::" + plugin.name + " version " + plugin.version +
                        " (contract " + std::to_string(plugin.contract_version) + "), this program knows " +
                        kPluginNamespace + "::" + kPluginName + " version " + kPluginVersions.front() + " to " +
                        kPluginVersions.back() + " (contract " + std::to_string(contract_of(1)) + ", of version 3 " +
                        std::to_string(contract_of(kCodesVersion)) + ")", folder,
                    "build the engine with the version of gqa-export that this program was built from");
    }
    if (library.empty()) {
        throw Error("the engine's attention layers need libgqa_plugin.so", "Options::plugin_library",
                    "set it to the library's path (it is built from plugins/cpp), or build the engine with "
                    "`gqa-export trt --attention native`");
    }
    if (!std::ifstream(library)) {
        throw Error("there is no plugin library", library, "build it from plugins/cpp and give its path");
    }
}

void check_ranks(Manifest const& manifest, int size, int device, int own_device, std::string const& where) {
    std::string const ranks = std::to_string(manifest.ranks);
    if (size == 0 && manifest.ranks > 1) {
        throw Error("the bundle is cut over " + ranks + " ranks, and no communicator was given", where,
                    "start " + ranks + " processes, each with Options::communicator (gqa/runtime/communicator.h)");
    }
    if (size > 0 && manifest.ranks == 1) {
        throw Error("a communicator was given, and the bundle is for one device", where,
                    "leave out Options::communicator, or export with --tensor-parallel " + std::to_string(size));
    }
    if (size > 0 && size != manifest.ranks) {
        throw Error("the bundle is cut over " + ranks + " ranks, and the communicator has " + std::to_string(size), where,
                    "start " + ranks + " ranks, or export with --tensor-parallel " + std::to_string(size));
    }
    if (size > 0 && device != own_device) {
        throw Error("the communicator is of GPU " + std::to_string(device) + ", and the session is to run on GPU " +
                        std::to_string(own_device), "Options::device", "set it to the communicator's");
    }
}

void check_engine_file(Manifest const& manifest, std::string const& folder) {
    std::string const path = folder + "/" + manifest.engine_file;
    if (manifest.stripped) {
        throw Error("the engine was built with --strip-weights: its weights are not inside", path,
                    "build it without --strip-weights, or refit it first");
    }
    if (sha256_of_file(path) != manifest.engine_sha256) {
        throw Error("the engine's file is not the one that the manifest describes: its sha256 differs", path,
                    "copy the bundle again, or build the engine again with `gqa-export trt`");
    }
}

}  // namespace gqa
