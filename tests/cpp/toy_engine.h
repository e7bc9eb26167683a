// The toy model behind the seam of gqa/runtime/engine.h.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gqa/runtime/engine.h"
#include "gqa/runtime/manifest.h"
#include "stub_cuda.h"
#include "toy_model.h"

class ToyContext final : public gqa::EngineContext {
public:
    explicit ToyContext(ToyCall call) : call_(std::move(call)) {}

    void set_shape(std::string const& input, gqa::Shape const& shape) override { call_.tensors[input].shape = shape; }
    void bind(std::string const& tensor, gqa::cuda::Address address) override {
        call_.tensors[tensor].address = reinterpret_cast<void*>(address);
    }
    void enqueue(gqa::cuda::Stream stream) override {
        std::string const problem = call_.problem();
        if (!problem.empty()) throw gqa::Error(problem, "toy", "the runtime is wrong");
        gqa_stub_enqueue(stream, [call = call_] {
            auto const& ids = call.tensors.at("input_ids").shape;
            gqa_stub_log("run profile " + std::to_string(call.profile) + " batch " + std::to_string(ids[0]) +
                         " steps " + std::to_string(ids[1]));
            call.run();
        });
    }

private:
    ToyCall call_;
};

class ToyEngine final : public gqa::Engine {
public:
    explicit ToyEngine(gqa::Manifest const& manifest) {
        call_.capacity = manifest.capacity;
        call_.vocabulary = manifest.vocabulary;
        call_.max_batch = manifest.max_batch;
        call_.max_prompt = manifest.max_prompt;
        call_.slots = manifest.prompt_chunk ? manifest.least_slots : 0;
        call_.window = call_.slots - manifest.prompt_chunk;
        for (auto const& output : manifest.outputs) call_.half = output.number == gqa::Number::fp16;
    }
    std::vector<std::string> tensors() const override { return ToyCall::names(true, true); }
    std::unique_ptr<gqa::EngineContext> context(int profile, gqa::cuda::Stream) override {
        ToyCall call = call_;
        call.profile = profile;
        return std::make_unique<ToyContext>(std::move(call));
    }

private:
    ToyCall call_;
};
