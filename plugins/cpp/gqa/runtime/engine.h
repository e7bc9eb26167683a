// The seam between the runtime and an inference library: an engine, and one execution context per profile.
//
// tensorrt_engine.cpp implements it over TensorRT or TensorRT-RTX. Everything above it needs neither headers nor library.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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
};

class Engine {
public:
    virtual ~Engine() = default;
    virtual std::vector<std::string> tensors() const = 0;
    virtual std::unique_ptr<EngineContext> context(int profile, cuda::Stream stream) = 0;
};

}  // namespace gqa
