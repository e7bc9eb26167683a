// Runs an engine bundle on token ids and prints the new ones, a line per prompt.
//
//   gqa_generate ENGINE_BUNDLE [--plugin libgqa_plugin.so] --tokens "1 2 3" [--tokens "4 5"] [--max-new-tokens 128]
//                [--end 2 ...] [--device 0] [--no-cuda-graph]
//
// Ends with 0, or with 2 and three lines (what, where, fix) on standard error.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

#include "gqa/runtime/session.h"

namespace {

constexpr char kUsage[] =
    "gqa_generate ENGINE_BUNDLE --tokens \"1 2 3\" [--tokens \"4 5\" ...] [--plugin libgqa_plugin.so]\n"
    "             [--max-new-tokens 128] [--end ID ...] [--device 0] [--no-cuda-graph]";

[[noreturn]] void refuse(std::string const& what) { throw gqa::Error(what, "command line", kUsage); }

std::int64_t to_number(std::string const& word, std::string const& option) {
    char* end = nullptr;
    long long const value = std::strtoll(word.c_str(), &end, 10);
    if (word.empty() || *end) refuse(option + " takes whole numbers, not '" + word + "'");
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
};

Command parse(std::vector<std::string> const& words) {
    Command command;
    for (std::size_t i = 0; i < words.size(); ++i) {
        std::string const& option = words[i];
        auto value = [&]() -> std::string const& {
            if (i + 1 == words.size()) refuse(option + " lacks its value");
            return words[++i];
        };
        if (option == "--tokens") {
            command.prompts.push_back(to_tokens(value(), option));
        } else if (option == "--plugin") {
            command.options.plugin_library = value();
        } else if (option == "--max-new-tokens") {
            command.generate.max_new_tokens = to_number(value(), option);
        } else if (option == "--end") {
            command.generate.end_tokens.push_back(static_cast<gqa::Token>(to_number(value(), option)));
        } else if (option == "--device") {
            command.options.device = static_cast<int>(to_number(value(), option));
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
    return command;
}

}  // namespace

int main(int count, char** words) {
    try {
        Command const command = parse({words + 1, words + count});
        gqa::Session session = gqa::Session::load(command.folder, command.options);
        for (gqa::Tokens const& row : session.generate(command.prompts, command.generate)) {
            for (gqa::Token token : row) std::printf("%d ", token);
            std::printf("\n");
        }
        return 0;
    } catch (std::exception const& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
