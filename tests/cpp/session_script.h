// Runs a session by the lines of standard input and prints one line per command; errors are printed, not thrown.
//
//   prefill 1,2,3;4,5      rows of tokens; a row may be empty        -> best token of every row
//   extend 6;              the same, more tokens into the rows       -> best token of every row
//   step 7,-1              one token per row, -1 for none            -> best token of every row
//   generate 8 9,10 1,2;3  at most 8 tokens, end tokens 9 and 10 (- : the manifest's), prompts
//   open 3                 a batch of empty rows                     -> lengths, as of the next three
//   reset 0                empties a row
//   rewind 0 2             keeps its first two tokens
//   copy 0 1 2             row 1 begins with the first two of row 0; -1: with all
//   lengths
//   seed 7                 -> the seed that all ranks share
//   sample 8 7 0.9 1,2;3   8 tokens at temperature 0.9 with that seed
#pragma once

#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "gqa/runtime/sampling.h"
#include "gqa/runtime/session.h"

namespace script {

inline gqa::Tokens tokens(std::string const& text) {
    gqa::Tokens found;
    std::istringstream items(text);
    for (std::string item; std::getline(items, item, ',');) found.push_back(std::stoi(item));
    return found;
}

inline std::vector<gqa::Tokens> rows(std::string const& text) {
    std::vector<gqa::Tokens> found;
    std::istringstream items(text);
    for (std::string item; std::getline(items, item, ';');) found.push_back(tokens(item));
    if (!text.empty() && text.back() == ';') found.emplace_back();  // "1,2;" has a second, empty row
    return found;
}

inline std::string best(gqa::Logits const& logits) {
    std::string text;
    for (std::size_t row = 0; row < logits.rows(); ++row) text += (row ? " " : "") + std::to_string(logits.best(row));
    return text;
}

inline std::string answer(gqa::Session& session, std::string const& command, std::istringstream& words) {
    std::string first, second, third, fourth, text;
    words >> first >> second >> third >> fourth;
    if (command == "prefill") return best(session.prefill(rows(first)));
    if (command == "extend") return best(session.extend(rows(first)));
    if (command == "step") return best(session.step(tokens(first)));
    if (command == "seed") return std::to_string(session.shared_seed(std::stoull(first)));
    if (command == "generate" || command == "sample") {
        bool const drawn = command == "sample";
        gqa::GenerateOptions options;
        options.max_new_tokens = std::stoll(first);
        if (!drawn && second != "-") options.end_tokens = tokens(second);
        gqa::Draws draws(drawn ? session.shared_seed(std::stoull(second)) : 0);
        gqa::Sampling const sampling{drawn ? std::stod(third) : 0, 0, 1, 0};
        options.choose = [&](std::size_t, float const* logits, std::size_t vocabulary) {
            return gqa::choose(logits, vocabulary, sampling, draws.next());
        };
        for (auto const& row : session.generate(rows(drawn ? fourth : third), options)) {
            text += text.empty() ? "" : ";";
            for (std::size_t i = 0; i < row.size(); ++i) text += (i ? "," : "") + std::to_string(row[i]);
        }
        return text;
    }
    if (command == "open") session.open(std::stoul(first));
    if (command == "reset") session.reset_row(std::stoul(first));
    if (command == "rewind") session.rewind_row(std::stoul(first), std::stoll(second));
    if (command == "copy") session.copy_row(std::stoul(first), std::stoul(second), std::stoll(third));
    for (auto length : session.lengths()) text += (text.empty() ? "" : " ") + std::to_string(length);
    return text;
}

inline void print_error(gqa::Error const& error) {
    std::cout << "error|" << error.cause() << "|" << error.where() << "|" << error.fix() << std::endl;
}

inline void run(gqa::Session& session) {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string command;
        words >> command;
        try {
            std::cout << answer(session, command, words) << std::endl;
        } catch (gqa::Error const& error) {
            print_error(error);
        }
    }
}

}  // namespace script
