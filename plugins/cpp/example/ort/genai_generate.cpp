// A bundle of target `ort` through onnxruntime-genai's C++ interface (ort_genai.h, a thin layer over its C interface).
//
//   genai_generate BUNDLE NEW_TOKENS "3 1 4"      token ids of the prompt; prints the new ids
//
// With the bundle's tokenizer, OgaTokenizer::Create(*model) turns text into ids and back.
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ort_genai.h>

int main(int count, char** words) try {
    if (count != 4) throw std::runtime_error("usage: genai_generate BUNDLE NEW_TOKENS \"3 1 4\"");
    std::vector<std::int32_t> prompt;
    std::istringstream text(words[3]);
    for (std::int32_t id; text >> id;) prompt.push_back(id);

    OgaHandle const library;  // shuts the library down at the end
    auto const model = OgaModel::Create(words[1]);
    auto const params = OgaGeneratorParams::Create(*model);
    double const total = static_cast<double>(prompt.size()) + std::stod(words[2]);
    params->SetSearchOption("max_length", total);
    params->SetSearchOption("min_length", total);  // no end token: the answers of all programs here have one length
    auto const generator = OgaGenerator::Create(*model, *params);
    generator->AppendTokens(prompt.data(), prompt.size());
    while (!generator->IsDone()) generator->GenerateNextToken();

    std::size_t const length = generator->GetSequenceCount(0);
    std::int32_t const* const sequence = generator->GetSequenceData(0);
    for (std::size_t i = prompt.size(); i < length; ++i) std::printf("%d ", sequence[i]);
    std::printf("\n");
    return 0;
} catch (std::exception const& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
}
