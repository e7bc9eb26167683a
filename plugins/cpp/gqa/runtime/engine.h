// The seam between the runtime and an inference library: an engine, and one execution context per profile.
//
// tensorrt_engine.cpp implements it over TensorRT or TensorRT-RTX. Everything above it needs neither headers nor library.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gqa/core/error.h"
#include "gqa/cuda/driver.h"

namespace gqa {

using Shape = std::vector<std::int64_t>;

// Runs one optimization profile. Shapes and addresses stay until they are set again.
class EngineContext {
public:
    virtual ~EngineContext() = default;
    virtual void set_shape(std::string const& input, Shape const& shape) = 0;
    virtual void bind(std::string const& tensor, cuda::Address address) = 0;
    virtual void enqueue(cuda::Stream stream) = 0;  // asynchronous; may be captured once it has run for these shapes
    // Takes an ncclComm_t, before the first run. Every rank does so at once; returns when all have.
    virtual void join(void* communicator);
};

class Engine {
public:
    virtual ~Engine() = default;
    virtual std::vector<std::string> tensors() const = 0;
    virtual std::unique_ptr<EngineContext> context(int profile, cuda::Stream stream) = 0;
};

inline void EngineContext::join(void*) {
    throw Error("this engine does not take a communicator", "EngineContext::join", "override it, or run on one device");
}

}  // namespace gqa
