// gqa_load: what of the C interface needs TensorRT's headers.
#include <exception>

#include "gqa/c/handle.h"
#include "gqa/core/error.h"
#include "gqa_export.h"

gqa_session* gqa_load(const char* folder, const gqa_options* options) {
    try {
        if (!folder) throw gqa::Error("the folder is NULL", "gqa_load", "give the folder of an engine bundle");
        gqa::Options wanted;
        if (options) {
            wanted.device = options->device;
            if (options->plugin_library) wanted.plugin_library = options->plugin_library;
            wanted.cuda_graph = options->cuda_graph != 0;
        }
        return new gqa_session(gqa::Session::load(folder, wanted));
    } catch (std::exception const& error) {
        gqa::c::remember(error.what());
    } catch (...) {
        gqa::c::remember("an error without a text");
    }
    return nullptr;
}
