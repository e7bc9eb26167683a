// A "model" whose answer shows at once whether the runtime fed it right: it writes every new token into its cache, adds
// up what the cache holds, and puts all probability on (sum * 7 + length) % vocabulary. A cache that is not zeroed, not
// kept, not shared between profiles, or a graph that replays old inputs gives other tokens. After the vocabulary's last
// token its logits are NaN, as those of an engine whose numbers overflowed.
//
// Tensors as in an engine: input_ids [B, S], past_lengths [B], new_lengths [B] int32; past_key_values.i.key|value
// [B, K, C, 2] and the presents in fp16 or fp32; logits [B, 1, V]. K is 1 but for ranks.
//
// A rank's engine has a summand of the sum, its number times its own cache's, and all ranks add theirs up by NCCL
// before they answer: a rank that is not there, or twice, changes the answer of all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

struct ToyTensor {
    void* address = nullptr;
    std::vector<std::int64_t> shape;
};

struct ToyCall {
    std::map<std::string, ToyTensor> tensors;
    std::int64_t capacity = 0, vocabulary = 0, max_batch = 0, max_prompt = 0;
    bool half = false;   // fp16, else fp32
    bool coded = false;  // the cache holds codes of a byte, whose scale is 1
    bool hidden = false;  // hidden_states [B, S, 3] are an output too, each the token's own
    int profile = 0;     // 0 decode, 1 prefill
    std::int64_t slots = 0, window = 0;  // of the last layer, a ring that adds up a window alone; 0: it keeps all
    int rank = 0;        // counted from 1; 0: one device
    std::int64_t heads = 1;
    void* communicator = nullptr;

    static constexpr int kLayers = 2;
    static constexpr std::int64_t kHead = 2;

    static std::vector<std::string> names(bool inputs, bool outputs) {
        std::vector<std::string> all;
        if (inputs) all = {"input_ids", "past_lengths", "new_lengths"};
        for (int layer = 0; layer < kLayers; ++layer) {
            for (char const* part : {"key", "value"}) {
                std::string const tail = "." + std::to_string(layer) + "." + part;
                if (inputs) all.push_back("past_key_values" + tail);
                if (outputs) all.push_back("present" + tail);
            }
        }
        if (outputs) all.push_back("logits");
        return all;
    }

    // Why this call would be refused by TensorRT, or "".
    std::string problem() const {
        for (std::string const& name : names(true, true)) {
            if (!tensors.count(name) || !tensors.at(name).address) return name + " is not bound";
        }
        if (hidden && (!tensors.count("hidden_states") || !tensors.at("hidden_states").address)) {
            return "hidden_states is not bound";
        }
        if (rank && !communicator) return "the communicator is not set";
        auto const& ids = tensors.at("input_ids").shape;
        if (ids.size() != 2 || ids[0] < 1 || ids[0] > max_batch) return "input_ids: batch outside the profile";
        if (ids[1] < 1 || ids[1] > (profile == 0 ? 1 : max_prompt)) return "input_ids: steps outside the profile";
        for (char const* name : {"past_lengths", "new_lengths"}) {
            if (tensors.at(name).shape != std::vector<std::int64_t>{ids[0]}) return std::string(name) + ": shape";
        }
        for (std::string const& name : names(true, false)) {
            if (name.rfind("past_key_values", 0) != 0) continue;
            bool const ring = name.find('.' + std::to_string(kLayers - 1) + '.') != std::string::npos && slots;
            std::int64_t const axis = ring ? slots : capacity;
            if (tensors.at(name).shape != std::vector<std::int64_t>{ids[0], heads, axis, kHead}) return name + ": shape";
            std::string const present = "present" + name.substr(std::strlen("past_key_values"));
            if (tensors.at(present).address != tensors.at(name).address) return present + " is not " + name;
        }
        return "";
    }

    void run() const {
        std::vector<float> sums(static_cast<std::size_t>(tensors.at("input_ids").shape[0]));
        read(sums.data());
        answer(sums.data());
    }

    // Writes the new tokens into the cache and adds up what it holds, for every row.
    void read(float* sums) const {
        std::int64_t const batch = tensors.at("input_ids").shape[0], steps = tensors.at("input_ids").shape[1];
        auto const* const ids = integers("input_ids");
        for (std::int64_t row = 0; row < batch; ++row) {
            std::int64_t const past = integers("past_lengths")[row], fresh = integers("new_lengths")[row];
            double sum = 0;
            for (int layer = 0; layer < kLayers; ++layer) {
                std::string const key = "past_key_values." + std::to_string(layer) + ".key";
                if (slots && layer == kLayers - 1) {
                    for (std::int64_t i = 0; i < fresh; ++i) {
                        set(key, (row * slots + (past + i) % slots) * kHead, static_cast<float>(ids[row * steps + i]));
                    }
                    for (std::int64_t t = past + fresh - 1; t >= 0 && t > past + fresh - 1 - window; --t) {
                        sum += get(key, (row * slots + t % slots) * kHead);
                    }
                    continue;
                }
                for (std::int64_t i = 0; i < fresh; ++i) {
                    set(key, (row * heads * capacity + past + i) * kHead, static_cast<float>(ids[row * steps + i]));
                }
                // All of the cache, as native attention reads it: whatever is beyond the lengths counts too if not 0.
                for (std::int64_t i = 0; i < capacity; ++i) {
                    float const value = get(key, (row * heads * capacity + i) * kHead);
                    sum += i < past + fresh ? value : value * 0;
                }
            }
            sums[row] = static_cast<float>(rank ? sum * rank : sum);
        }
    }

    // The logits of every row, from the sums of all ranks.
    void answer(float const* sums) const {
        std::int64_t const batch = tensors.at("input_ids").shape[0], steps = tensors.at("input_ids").shape[1];
        auto const* const ids = integers("input_ids");
        for (std::int64_t row = 0; row < batch; ++row) {
            std::int64_t const past = integers("past_lengths")[row], fresh = integers("new_lengths")[row];
            double const sum = sums[row];
            bool const poisoned = fresh > 0 && ids[row * steps + fresh - 1] == vocabulary - 1;
            auto const answer = static_cast<std::int64_t>(sum * 7 + static_cast<double>(past + fresh)) % vocabulary;
            for (std::int64_t i = 0; hidden && i < steps * 3; ++i) {
                set("hidden_states", row * steps * 3 + i, static_cast<float>(ids[row * steps + i / 3]));
            }
            for (std::int64_t token = 0; token < vocabulary; ++token) {
                float const value = token == answer ? 1.0f : 0.0f;
                set("logits", row * vocabulary + token, sum == sum && !poisoned ? value : std::nanf(""));
            }
        }
    }

private:
    std::int32_t const* integers(char const* name) const {
        return static_cast<std::int32_t const*>(tensors.at(name).address);
    }
    // Tokens are small whole numbers: fp16 of them is written and read by hand, without a half type.
    void set(std::string const& name, std::int64_t index, float value) const {
        if (coded && name.rfind("past_key_values", 0) == 0) {
            static_cast<std::int8_t*>(tensors.at(name).address)[index] = static_cast<std::int8_t>(value);
            return;
        }
        if (!half) {
            static_cast<float*>(tensors.at(name).address)[index] = value;
            return;
        }
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        std::uint32_t const exponent = std::isnan(value) ? 31 : (bits >> 23 & 0xff) - 112;
        static_cast<std::uint16_t*>(tensors.at(name).address)[index] =
            value == 0 ? 0 : static_cast<std::uint16_t>(exponent << 10 | (bits >> 13 & 0x3ff));
    }
    float get(std::string const& name, std::int64_t index) const {
        if (coded) return static_cast<std::int8_t*>(tensors.at(name).address)[index];
        if (!half) return static_cast<float*>(tensors.at(name).address)[index];
        std::uint32_t const bits = static_cast<std::uint16_t*>(tensors.at(name).address)[index];
        if (bits == 0) return 0;
        std::uint32_t const exponent = bits >> 10 & 0x1f;
        std::uint32_t const wide = (exponent == 31 ? 255u : exponent + 112) << 23 | (bits & 0x3ff) << 13;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};
