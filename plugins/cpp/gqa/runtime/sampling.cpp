#include "gqa/runtime/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace gqa {

std::int32_t choose(float const* logits, std::size_t vocabulary, Sampling const& sampling, double uniform) {
    if (sampling.temperature == 0) {
        return static_cast<std::int32_t>(std::max_element(logits, logits + vocabulary) - logits);
    }
    std::vector<std::int32_t> order(vocabulary);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto one, auto other) { return logits[one] > logits[other]; });
    if (sampling.top_k > 0 && static_cast<std::size_t>(sampling.top_k) < order.size()) {
        order.resize(static_cast<std::size_t>(sampling.top_k));
    }
    std::vector<double> share(order.size());
    double total = 0;
    for (std::size_t i = 0; i < order.size(); ++i) {
        share[i] = std::exp((static_cast<double>(logits[order[i]]) - logits[order[0]]) / sampling.temperature);
        total += share[i];
    }
    std::size_t kept = 0;
    double before = 0;  // of the tokens that are more probable
    double const least = sampling.min_p * share[0] / total;
    for (; kept < order.size() && before < sampling.top_p && share[kept] / total >= least; ++kept) {
        before += share[kept] / total;
    }
    auto const end = share.begin() + static_cast<std::ptrdiff_t>(kept);
    double const place = uniform * std::accumulate(share.begin(), end, 0.0);
    double reached = 0;
    for (std::size_t i = 0; i + 1 < kept; ++i) {
        reached += share[i];
        if (place < reached) return order[i];
    }
    return order[kept ? kept - 1 : 0];
}

}  // namespace gqa
