#include "gqa/cuda/memory.h"

#include <string>

#include "gqa/core/error.h"

namespace gqa::cuda {

DeviceContext::DeviceContext(int ordinal) {
    int count = 0;
    check(driver().device_get_count(&count), "counting GPUs");
    if (ordinal < 0 || ordinal >= count) {
        throw Error("there is no GPU " + std::to_string(ordinal), "Options::device",
                    "this machine has " + std::to_string(count) + ", counted from 0");
    }
    check(driver().device_get(&device_, ordinal), "opening the GPU");
    check(driver().primary_context_retain(&context_, device_), "opening the GPU");
    make_current();
}

DeviceContext::~DeviceContext() { driver().primary_context_release(device_); }

void DeviceContext::make_current() const { check(driver().context_set_current(context_), "choosing the GPU"); }

OwnedStream::OwnedStream() { check(driver().stream_create(&stream_, kNonBlockingStream), "making a CUDA stream"); }
OwnedStream::~OwnedStream() { driver().stream_destroy(stream_); }

bool OwnedStream::done() const {
    Result const result = driver().stream_query(stream_);
    if (result == kNotReady) return false;
    check(result, "running the engine");
    return true;
}

DeviceMemory::DeviceMemory(std::size_t bytes, Stream stream) : bytes_(bytes) {
    check(driver().allocate(&address_, bytes), ("allocating " + std::to_string(bytes) + " bytes on the GPU").c_str());
    Result const result = driver().fill(address_, 0, bytes, stream);
    if (result != kSuccess) driver().free(address_);
    check(result, "zeroing GPU memory");
}

DeviceMemory::~DeviceMemory() {
    if (address_) driver().free(address_);
}

PinnedMemory::PinnedMemory(std::size_t bytes) {
    check(driver().allocate_host(&data_, bytes), "allocating pinned host memory");
}

PinnedMemory::~PinnedMemory() { driver().free_host(data_); }

void CapturedGraph::abandon(Stream stream) {
    Graph graph = nullptr;
    driver().capture_end(stream, &graph);
    if (graph) driver().graph_destroy(graph);
}

void CapturedGraph::finish(Stream stream) {
    Graph graph = nullptr;
    check(driver().capture_end(stream, &graph), "ending the capture of a CUDA graph");
    Result const result = driver().graph_instantiate(&graph_, graph, 0);
    driver().graph_destroy(graph);
    check(result, "making a CUDA graph");
}

CapturedGraph::~CapturedGraph() { driver().graph_exec_destroy(graph_); }

}  // namespace gqa::cuda
