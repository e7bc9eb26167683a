// Runs an engine bundle on token ids and prints the new ones, a line per prompt.
//
//   gqa_generate ENGINE_BUNDLE [--plugin libgqa_plugin.so] --tokens "1 2 3" [--tokens "4 5"] [--max-new-tokens 128]
//                [--end 2 ...] [--device 0] [--no-cuda-graph] [--temperature 0.8 --seed 1 --top-k 40 --top-p 0.9 --min-p 0]
//
// Of a bundle that is cut over devices, a process for each rank, with a file that all can read and that is not there yet:
//
//   for rank in 0 1; do gqa_generate ENGINE_BUNDLE --rank $rank --ranks 2 --meeting /tmp/meeting --tokens "1 2 3" & done
//
// Rank 0 prints.
// Ends with 0, or with 2 and three lines (what, where, fix) on standard error.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "gqa/cuda/memory.h"
#include "gqa/runtime/sampling.h"
#include "gqa/runtime/session.h"

namespace {

constexpr char kUsage[] =
    "gqa_generate ENGINE_BUNDLE --tokens \"1 2 3\" [--tokens \"4 5\" ...] [--plugin libgqa_plugin.so]\n"
    "             [--max-new-tokens 128] [--end ID ...] [--device 0] [--no-cuda-graph]\n"
    "             [--temperature 0] [--top-k 0] [--top-p 1] [--min-p 0] [--seed 0]\n"
    "             [--rank 0 --ranks 1 --meeting FILE --timeout 120]";

[[noreturn]] void refuse(std::string const& what) { throw gqa::Error(what, "command line", kUsage); }

std::int64_t to_number(std::string const& word, std::string const& option) {
    char* end = nullptr;
    long long const value = std::strtoll(word.c_str(), &end, 10);
    if (word.empty() || *end) refuse(option + " takes whole numbers, not '" + word + "'");
    return value;
}

double to_real(std::string const& word, std::string const& option) {
    char* end = nullptr;
    double const value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end) refuse(option + " takes numbers, not '" + word + "'");
    return value;
}

gqa::Tokens to_tokens(std::string const& text, std::string const& option) {
    gqa::Tokens tokens;
    std::istringstream words(text);
    for (std::string word; words >> word;) tokens.push_back(static_cast<gqa::Token>(to_number(word, option)));
    return tokens;
}

struct Command {
    std::string folder;
    std::vector<gqa::Tokens> prompts;
    gqa::Options options;
    gqa::GenerateOptions generate;
    gqa::Sampling sampling;
    std::uint64_t seed = 0;
    int rank = 0, ranks = 1;
    double timeout = gqa::Communicator::kTimeoutSeconds;
    std::string meeting;
};

// Options that take a number, and where it goes.
using Setter = void (*)(Command&, std::string const& option, std::string const& value);
struct NumberOption {
    char const* name;
    Setter set;
};

constexpr NumberOption kNumbers[] = {
    {"--temperature", [](Command& c, auto& o, auto& v) { c.sampling.temperature = to_real(v, o); }},
    {"--top-k", [](Command& c, auto& o, auto& v) { c.sampling.top_k = to_number(v, o); }},
    {"--top-p", [](Command& c, auto& o, auto& v) { c.sampling.top_p = to_real(v, o); }},
    {"--min-p", [](Command& c, auto& o, auto& v) { c.sampling.min_p = to_real(v, o); }},
    {"--seed", [](Command& c, auto& o, auto& v) { c.seed = static_cast<std::uint64_t>(to_number(v, o)); }},
    {"--rank", [](Command& c, auto& o, auto& v) { c.rank = static_cast<int>(to_number(v, o)); }},
    {"--ranks", [](Command& c, auto& o, auto& v) { c.ranks = static_cast<int>(to_number(v, o)); }},
    {"--timeout", [](Command& c, auto& o, auto& v) { c.timeout = to_real(v, o); }},
    {"--device", [](Command& c, auto& o, auto& v) { c.options.device = static_cast<int>(to_number(v, o)); }},
    {"--max-new-tokens", [](Command& c, auto& o, auto& v) { c.generate.max_new_tokens = to_number(v, o); }},
    {"--end", [](Command& c, auto& o, auto& v) {
         c.generate.end_tokens.push_back(static_cast<gqa::Token>(to_number(v, o)));
     }},
};

Command parse(std::vector<std::string> const& words) {
    Command command;
    command.options.device = -1;
    for (std::size_t i = 0; i < words.size(); ++i) {
        std::string const& option = words[i];
        auto value = [&]() -> std::string const& {
            if (i + 1 == words.size()) refuse(option + " lacks its value");
            return words[++i];
        };
        auto const number = std::find_if(std::begin(kNumbers), std::end(kNumbers),
                                         [&](NumberOption const& one) { return option == one.name; });
        if (number != std::end(kNumbers)) {
            number->set(command, option, value());
        } else if (option == "--tokens") {
            command.prompts.push_back(to_tokens(value(), option));
        } else if (option == "--plugin") {
            command.options.plugin_library = value();
        } else if (option == "--meeting") {
            command.meeting = value();
        } else if (option == "--no-cuda-graph") {
            command.options.cuda_graph = false;
        } else if (option.rfind("--", 0) == 0 || !command.folder.empty()) {
            refuse("'" + option + "' is not understood");
        } else {
            command.folder = option;
        }
    }
    if (command.folder.empty()) refuse("no engine bundle is named");
    if (command.prompts.empty()) refuse("there is no prompt");
    if (command.ranks < 1 || command.rank < 0 || command.rank >= command.ranks) refuse("--rank counts from 0 to --ranks");
    if (command.ranks > 1 && command.meeting.empty()) refuse("several ranks need --meeting, a file that all can read");
    if (command.options.device < 0) command.options.device = command.rank;
    return command;
}

}  // namespace

int main(int count, char** words) {
    try {
        Command command = parse({words + 1, words + count});
        if (command.ranks > 1) {
            gqa::cuda::DeviceContext const device(command.options.device);
            command.options.communicator =
                gqa::Communicator::join_by_file(command.meeting, command.rank, command.ranks, command.timeout);
        }
        gqa::Session session = gqa::Session::load(command.folder, command.options);
        gqa::Draws draws(session.shared_seed(command.seed));
        command.generate.choose = [&](std::size_t, float const* logits, std::size_t vocabulary) {
            return gqa::choose(logits, vocabulary, command.sampling, draws.next());
        };
        for (gqa::Tokens const& row : session.generate(command.prompts, command.generate)) {
            if (command.rank > 0) break;
            for (gqa::Token token : row) std::printf("%d ", token);
            std::printf("\n");
        }
        return 0;
    } catch (std::exception const& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        std::_Exit(2);  // a thread of NCCL or TensorRT may still wait for the other ranks
    }
}
