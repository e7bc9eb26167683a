// What a program holds on a GPU, each freed by its destructor: a context, a stream, memory, a captured graph.
#pragma once

#include <cstddef>
#include <utility>

#include "gqa/cuda/driver.h"

namespace gqa::cuda {

// The primary context of a GPU (the one that the CUDA runtime and TensorRT use), current on this thread while it lives.
class DeviceContext {
public:
    explicit DeviceContext(int ordinal);  // throws Error for a GPU that is not there
    ~DeviceContext();
    DeviceContext(DeviceContext const&) = delete;
    DeviceContext& operator=(DeviceContext const&) = delete;

    void make_current() const;  // on the calling thread, which may be another one now
    DeviceFacts facts() const { return device_facts(device_); }

private:
    Device device_ = 0;
    Context context_ = nullptr;
};

class OwnedStream {
public:
    OwnedStream();
    ~OwnedStream();
    OwnedStream(OwnedStream const&) = delete;
    OwnedStream& operator=(OwnedStream const&) = delete;

    Stream get() const { return stream_; }
    void wait() const { check(driver().stream_synchronize(stream_), "running the engine"); }
    bool done() const;  // whether all that was put on it has run; throws Error where that failed

private:
    Stream stream_ = nullptr;
};

// Device memory, zeroed: what lies beyond a cache's lengths must be finite.
class DeviceMemory {
public:
    DeviceMemory(std::size_t bytes, Stream stream);
    ~DeviceMemory();
    DeviceMemory(DeviceMemory&& other) noexcept : address_(std::exchange(other.address_, 0)), bytes_(other.bytes_) {}
    DeviceMemory& operator=(DeviceMemory&&) = delete;

    Address address() const { return address_; }
    std::size_t bytes() const { return bytes_; }

private:
    Address address_ = 0;
    std::size_t bytes_ = 0;
};

// Host memory that the GPU reads and writes directly, so that copies can be part of a captured graph.
class PinnedMemory {
public:
    explicit PinnedMemory(std::size_t bytes);
    ~PinnedMemory();
    PinnedMemory(PinnedMemory const&) = delete;
    PinnedMemory& operator=(PinnedMemory const&) = delete;

    template <typename Item>
    Item* as() const {
        return static_cast<Item*>(data_);
    }

private:
    void* data_ = nullptr;
};

// A captured sequence of work, replayed with one call.
class CapturedGraph {
public:
    // Runs `enqueue`, which puts work on the stream, and keeps that work instead of doing it.
    template <typename Enqueue>
    CapturedGraph(Stream stream, Enqueue enqueue) {
        check(driver().capture_begin(stream, kCaptureThreadLocal), "beginning to capture a CUDA graph");
        try {
            enqueue();
        } catch (...) {
            abandon(stream);
            throw;
        }
        finish(stream);
    }
    ~CapturedGraph();
    CapturedGraph(CapturedGraph const&) = delete;
    CapturedGraph& operator=(CapturedGraph const&) = delete;

    void launch(Stream stream) const { check(driver().graph_launch(graph_, stream), "launching a CUDA graph"); }

private:
    static void abandon(Stream stream);
    void finish(Stream stream);

    GraphExec graph_ = nullptr;
};

}  // namespace gqa::cuda
