#include "gqa/plugin/log.h"

#include <atomic>
#include <cstdio>
#include <string>

namespace gqa::plugin {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder_of_tensorrt{nullptr};

nvinfer1::ILogger* logger() {
    nvinfer1::ILoggerFinder* const finder = finder_of_tensorrt.load();
    return finder ? finder->findLogger() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { finder_of_tensorrt.store(finder); }

void log_error(char const* doing, char const* what) noexcept {
    try {
        std::string const text = std::string("gqa::GroupedQueryAttention, ") + doing + ": " + what;
        if (nvinfer1::ILogger* const log = logger()) {
            log->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
        } else {
            std::fprintf(stderr, "error: %s\n", text.c_str());
        }
    } catch (...) {
        std::fputs("error: gqa::GroupedQueryAttention could not say what failed\n", stderr);
    }
}

}  // namespace gqa::plugin
