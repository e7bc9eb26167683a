// What stand-ins for TensorRT ask of the stand-in for CUDA, beyond the driver's own functions.
#pragma once

#include <functional>
#include <string>

struct CUstream_st;

// Runs `work` now, or, while the stream is captured, at every launch of the graph.
__attribute__((visibility("default"))) void gqa_stub_enqueue(CUstream_st* stream, std::function<void()> work);

// Adds a line to the file that GQA_STUB_LOG names.
__attribute__((visibility("default"))) void gqa_stub_log(std::string const& line);
