// session_on_toy MANIFEST [no-graph]: a Session over the toy model, through the seam of gqa/runtime/engine.h.
#include <fstream>
#include <iterator>

#include "gqa/cuda/memory.h"
#include "session_script.h"
#include "stub_cuda.h"
#include "toy_model.h"

namespace {

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

}  // namespace

int main(int count, char** words) {
    try {
        std::ifstream file(words[1]);
        gqa::Manifest const manifest =
            gqa::parse_manifest({std::istreambuf_iterator<char>(file), {}}, "gqa_export.json");
        gqa::cuda::DeviceContext const device(0);
        gqa::Options options;
        options.cuda_graph = count < 3;
        options.log = [](std::string const& text) { gqa_stub_log("note " + text.substr(0, text.find('\n'))); };
        gqa::Session session(manifest, std::make_unique<ToyEngine>(manifest), options);
        script::run(session);
        return 0;
    } catch (gqa::Error const& error) {
        script::print_error(error);
        return 2;
    }
}
