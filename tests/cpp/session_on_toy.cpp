// session_on_toy MANIFEST [no-graph]: a Session over the toy model, through the seam of gqa/runtime/engine.h.
#include <fstream>
#include <iterator>

#include "gqa/cuda/memory.h"
#include "session_script.h"
#include "stub_cuda.h"
#include "toy_engine.h"

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
