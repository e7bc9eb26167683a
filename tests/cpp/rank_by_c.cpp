// rank_by_c FOLDER RANK RANKS MEETING_FILE TIMEOUT: one rank through the C interface, which gets an ncclComm_t that this
// program made: NCCL is the stand-in, whose ids are names. Reads "PROMPT SEED" and prints tokens that it draws.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <vector>

#include "gqa/runtime/sampling.h"
#include "gqa_export.h"

struct Id {
    char internal[128];
};

static void stop() {
    std::cout << "error|" << gqa_last_error() << std::endl;
    std::_Exit(2);
}

int main(int, char** words) {
    int const rank = std::atoi(words[2]), ranks = std::atoi(words[3]);
    void* const library = dlopen("libnccl.so.2", RTLD_NOW);
    auto const init = reinterpret_cast<int (*)(void**, int, Id, int)>(dlsym(library, "ncclCommInitRank"));
    Id id{};
    std::string const name = std::filesystem::path(words[4]).filename().string();
    name.copy(id.internal, sizeof id.internal - 1);
    void* communicator = nullptr;
    if (init(&communicator, ranks, id, rank) != 0) return 3;
    gqa_options const options = {rank, nullptr, 1};
    gqa_session* const session = gqa_load_rank(words[1], &options, communicator, std::atof(words[5]));
    if (!session) stop();
    std::vector<float> logits(static_cast<std::size_t>(gqa_vocabulary(session)));
    std::int32_t token;
    std::uint64_t seed;
    while (std::cin >> token >> seed) {
        std::size_t const one = 1;
        if (gqa_shared_seed(session, seed, &seed) || gqa_open(session, 1)) stop();
        gqa::Draws draws(seed);
        gqa_sampling const sampling = {5, 0, 1, 0};
        for (int count = 0; count < 6; ++count) {
            if (gqa_extend(session, &token, &one, 1, logits.data())) stop();
            std::int32_t const best = static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) -
                                                                logits.begin());
            token = gqa_choose(logits.data(), logits.size(), &sampling, draws.next());
            std::cout << best << "," << token << " ";
        }
        std::cout << std::endl;
    }
    gqa_free(session);
    std::_Exit(0);
}
