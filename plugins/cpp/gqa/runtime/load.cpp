// Session::load: the one place that brings manifest, machine and TensorRT together.
#include <utility>

#include "gqa/runtime/meeting.h"
#include "gqa/runtime/rows.h"
#include "gqa/runtime/session.h"
#include "gqa/runtime/tensorrt.h"

namespace gqa {

Session Session::load(std::string const& folder, Options const& options) {
    Session session;
    meeting(options, [&] { session.rows_ = open_rows(folder, options); });
    return session;
}

std::unique_ptr<Session::Rows> Session::open_rows(std::string const& folder, Options const& options) {
    // In this order, so that the first message is about the first thing to mend.
    Communicator const* const ranks = options.communicator.get();
    Manifest manifest = read_manifest(folder, ranks ? ranks->rank() : 0);
    check_ranks(manifest, options, folder);
    TensorRt const tensorrt(log_of(options));
    check_flavor_and_version(manifest, tensorrt.flavor(), tensorrt.version(), folder);
    check_plugin(manifest, options.plugin_library, folder);
    auto device = std::make_unique<cuda::DeviceContext>(options.device);
    check_capability(manifest, device->facts().capability, folder);
    check_engine_file(manifest, folder);
    auto engine = tensorrt.load(manifest, folder, options.plugin_library);
    meet(manifest, options);
    device->make_current();
    return std::make_unique<Rows>(std::move(manifest), std::move(device), std::move(engine), options);
}

}  // namespace gqa
