// gqa_load and gqa_load_rank: what of the C interface needs TensorRT's headers.
#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "gqa/c/handle.h"
#include "gqa/core/error.h"
#include "gqa_export.h"

namespace {

gqa::Options options_of(gqa_options const* options) {
    gqa::Options wanted;
    if (!options) return wanted;
    wanted.device = options->device;
    if (options->plugin_library) wanted.plugin_library = options->plugin_library;
    wanted.cuda_graph = options->cuda_graph != 0;
    return wanted;
}

std::string checked(char const* folder) {
    if (!folder) throw gqa::Error("the folder is NULL", "gqa_load", "give the folder of an engine bundle");
    return folder;
}

// What `make` makes, or null and the error's text kept.
template <typename Make>
gqa_session* guarded(Make make) {
    try {
        return new gqa_session(make());
    } catch (std::exception const& error) {
        gqa::c::remember(error.what());
    } catch (...) {
        gqa::c::remember("an error without a text");
    }
    return nullptr;
}

}  // namespace

gqa_session* gqa_load(const char* folder, const gqa_options* options) {
    return guarded([&] { return gqa::Session::load(checked(folder), options_of(options)); });
}

gqa_session* gqa_load_rank(const char* folder, const gqa_options* options, void* communicator, double timeout_s) {
    return guarded([&] {
        gqa::Options wanted = options_of(options);
        double const seconds = timeout_s > 0 ? timeout_s : gqa::Communicator::kTimeoutSeconds;
        wanted.communicator = std::make_shared<gqa::Communicator>(static_cast<ncclComm*>(communicator), seconds);
        if (!options) wanted.device = wanted.communicator->device();
        if (!folder) wanted.communicator->leave();  // the others wait for an answer
        return gqa::Session::load(checked(folder), wanted);
    });
}
