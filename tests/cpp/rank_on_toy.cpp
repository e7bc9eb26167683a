// rank_on_toy MANIFEST RANK RANKS MEETING_FILE TIMEOUT: the Session of one rank over the toy model; started once a rank.
#include <fstream>
#include <iterator>

#include "gqa/cuda/memory.h"
#include "gqa/runtime/sampling.h"
#include "session_script.h"
#include "stub_cuda.h"
#include "toy_engine.h"

int main(int, char** words) {
    try {
        int const rank = std::stoi(words[2]), ranks = std::stoi(words[3]);
        gqa::cuda::DeviceContext const device(rank);
        gqa::Options options;
        options.device = rank;
        options.communicator = gqa::Communicator::join_by_file(words[4], rank, ranks, std::stod(words[5]));
        std::ifstream file(words[1]);
        gqa::Manifest const manifest =
            gqa::parse_manifest({std::istreambuf_iterator<char>(file), {}}, "gqa_export.json", rank);
        gqa::Session session(manifest, std::make_unique<ToyEngine>(manifest), options);
        script::run(session);
    } catch (gqa::Error const& error) {
        script::print_error(error);
        std::_Exit(2);  // as gqa_generate does
    }
    std::_Exit(0);
}
