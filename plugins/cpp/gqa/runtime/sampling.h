// How a token is chosen from a row's logits; the same as `pick` of gqa_export/runtime/sampling.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

namespace gqa {

// temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token.
struct Sampling {
    double temperature = 0;
    std::int64_t top_k = 0;
    double top_p = 1, min_p = 0;
};

// Temperature, then the top_k most probable, then the smallest set whose probability reaches top_p, then those with
// min_p of the best one's probability. uniform: a number from [0, 1), a place in what is left, most probable first.
std::int32_t choose(float const* logits, std::size_t vocabulary, Sampling const& sampling, double uniform);

// Numbers from [0, 1): of the same seed the same on every machine, and so on every rank.
class Draws {
public:
    explicit Draws(std::uint64_t seed) : engine_(seed) {}
    double next() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

private:
    std::mt19937_64 engine_;
};

}  // namespace gqa
