// How a session of one rank begins: all ranks are ready, or none begins. Inside of Session.
#pragma once

#include <string>

#include "gqa/runtime/manifest.h"
#include "gqa/runtime/session.h"

namespace gqa {

// Whether the bundle, the communicator and the device are of one another.
inline void check_ranks(Manifest const& manifest, Options const& options, std::string const& where) {
    Communicator const* const ranks = options.communicator.get();
    check_ranks(manifest, ranks ? ranks->size() : 0, ranks ? ranks->device() : 0, options.device, where);
}

// Every rank has its engine and the same collectives. Throws Error on all where one has not.
inline void meet(Manifest const& manifest, Options const& options) {
    if (options.communicator) options.communicator->meet(manifest.collectives_sha256);
}

// Does `work`; where it fails, this rank leaves the others, which would wait for it.
template <typename Work>
void meeting(Options const& options, Work work) {
    try {
        work();
    } catch (...) {
        if (options.communicator) options.communicator->leave();
        throw;
    }
}

}  // namespace gqa
