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
#include "toy_ranks.h"

class ToyContext final : public gqa::EngineContext {
public:
    ToyContext(ToyCall call, std::shared_ptr<int> count) : call_(std::move(call)), count_(std::move(count)) {}

    void set_shape(std::string const& input, gqa::Shape const& shape) override { call_.tensors[input].shape = shape; }
    void bind(std::string const& tensor, gqa::cuda::Address address) override {
        call_.tensors[tensor].address = reinterpret_cast<void*>(address);
    }
    void enqueue(gqa::cuda::Stream stream) override {
        std::string const problem = call_.problem();
        if (!problem.empty()) throw gqa::Error(problem, "toy", "the runtime is wrong");
        if (call_.rank) {
            if (toy::breaks("enqueue", *count_)) throw gqa::Error("this rank breaks", "toy", "");
            toy::enqueue_rank(call_, stream, (*count_)++);
            return;
        }
        gqa_stub_enqueue(stream, [call = call_] {
            auto const& ids = call.tensors.at("input_ids").shape;
            gqa_stub_log("run profile " + std::to_string(call.profile) + " batch " + std::to_string(ids[0]) +
                         " steps " + std::to_string(ids[1]));
            call.run();
        });
    }

    void join(void* communicator) override {
        if (toy::breaks("join")) throw gqa::Error("the toy refuses the communicator", "toy", "");
        gqa_stub_log("joined profile " + std::to_string(call_.profile));
        call_.communicator = communicator;
    }

private:
    ToyCall call_;
    std::shared_ptr<int> count_;  // runs of all profiles
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
        for (auto const& output : manifest.outputs) {
            if (output.name == "logits") call_.half = output.number == gqa::Number::fp16;
            call_.hidden = call_.hidden || output.name == "hidden_states";
        }
        for (auto const& input : manifest.inputs) {
            if (input.row.size() == 3) call_.heads = input.row[0];
            call_.coded = call_.coded || input.number == gqa::Number::int8 || input.number == gqa::Number::fp8;
        }
        if (manifest.ranks > 1) call_.rank = manifest.rank + 1;
    }
    std::vector<std::string> tensors() const override {
        std::vector<std::string> all = ToyCall::names(true, true);
        if (call_.hidden) all.push_back("hidden_states");
        return all;
    }
    std::unique_ptr<gqa::EngineContext> context(int profile, gqa::cuda::Stream) override {
        ToyCall call = call_;
        call.profile = profile;
        return std::make_unique<ToyContext>(std::move(call), count_);
    }

private:
    ToyCall call_;
    std::shared_ptr<int> count_ = std::make_shared<int>(0);
};
