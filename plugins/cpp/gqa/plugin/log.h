// Where the plugin's messages go: TensorRT's own logger where it gave us one, else standard error.
//
// No exception leaves the plugin: every callback runs inside `guarded`, which logs what was thrown, with its fix, and
// returns the value by which TensorRT recognises a failure.
#pragma once

#include <NvInferRuntime.h>

#include <exception>

namespace gqa::plugin {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
void log_error(char const* doing, char const* what) noexcept;

template <typename Value, typename Body>
Value guarded(char const* doing, Value failed, Body body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        log_error(doing, error.what());
    } catch (...) {
        log_error(doing, "unknown exception");
    }
    return failed;
}

}  // namespace gqa::plugin
