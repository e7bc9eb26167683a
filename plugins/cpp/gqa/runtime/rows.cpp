#include "gqa/runtime/rows.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>

namespace gqa {
namespace {

std::string row_name(std::size_t row) { return "row " + std::to_string(row); }

}  // namespace

std::function<void(std::string const&)> log_of(Options const& options) {
    if (options.log) return options.log;
    return [](std::string const& text) { std::fprintf(stderr, "note: %s\n", text.c_str()); };
}

Session::Rows::Rows(Manifest manifest, std::unique_ptr<cuda::DeviceContext> device, std::unique_ptr<Engine> engine,
                    Options const& options)
    : manifest_(std::move(manifest)),
      device_(std::move(device)),
      communicator_(options.communicator),
      runner_(manifest_, std::move(engine), options.cuda_graph, log_of(options), communicator_) {}

std::uint64_t Session::Rows::shared_seed(std::uint64_t seed) {
    if (!communicator_) return seed;
    std::string mine(sizeof seed, '\0');
    std::memcpy(mine.data(), &seed, sizeof seed);
    std::string const first = communicator_->gather(mine, "sharing a seed")[0];
    std::memcpy(&seed, first.data(), sizeof seed);
    return seed;
}

void Session::Rows::check_batch(std::size_t rows) const {
    if (rows >= 1 && rows <= static_cast<std::size_t>(manifest_.max_batch)) return;
    throw Error("the batch has " + std::to_string(rows) + " rows, the engine takes 1 to " +
                    std::to_string(manifest_.max_batch), "Session::prefill",
                "split the batch, or build the engine with a larger --max-batch");
}

void Session::Rows::check_token(std::size_t row, Token token) const {
    if (token >= 0 && token < manifest_.vocabulary) return;
    throw Error(row_name(row) + " has token " + std::to_string(token) + ", outside the vocabulary of " +
                    std::to_string(manifest_.vocabulary), "Session",
                "pass ids of the model's own tokenizer, which lies in the engine bundle");
}

void Session::Rows::check_fits(std::vector<std::int64_t> const& before, std::vector<Tokens> const& more,
                               std::int64_t reserve) const {
    if (more.size() != before.size()) {
        throw Error(std::to_string(more.size()) + " rows of tokens for a batch of " + std::to_string(before.size()),
                    "Session", "pass one row of tokens per prompt; begin a new batch with prefill");
    }
    for (std::size_t row = 0; row < more.size(); ++row) {
        for (Token token : more[row]) check_token(row, token);
        auto const wanted = static_cast<std::int64_t>(more[row].size()) + reserve;
        if (before[row] + wanted <= manifest_.capacity) continue;
        throw Error(row_name(row) + " holds " + std::to_string(before[row]) + " tokens and would get " +
                        std::to_string(wanted) + ": more than the cache's capacity of " +
                        std::to_string(manifest_.capacity), "Session",
                    "ask for fewer tokens, or export the bundle with a larger --capacity");
    }
}

void Session::Rows::forget(std::size_t rows) {
    if (device_) device_->make_current();
    lengths_.assign(rows, 0);
    ends_.assign(rows, 0);
    // TensorRT's own attention multiplies what lies beyond the lengths by 0, and 0 times NaN is NaN.
    if (!manifest_.plugin) runner_.zero_cache();
}

std::int64_t Session::Rows::least_length(std::size_t row) const {
    if (manifest_.prompt_chunk == 0 || ends_[row] <= manifest_.least_slots) return 0;
    return ends_[row] - manifest_.prompt_chunk - 1;
}

void Session::Rows::keep(std::size_t from, std::size_t to, std::int64_t length) {
    for (std::size_t row : {from, to}) {
        if (row < lengths_.size()) continue;
        throw Error(row_name(row) + " does not exist: the batch has " + std::to_string(lengths_.size()), "Session",
                    "begin a batch of more rows with open or prefill");
    }
    std::int64_t const held = lengths_[from];
    if (length < 0 || length > held) {
        throw Error(row_name(from) + " holds " + std::to_string(held) + " tokens, and " + std::to_string(length) +
                        " are to be kept", "Session", "keep 0 to " + std::to_string(held) + " tokens");
    }
    if (length > 0 && length <= manifest_.rope_switch && held > manifest_.rope_switch) {
        throw Error("the first " + std::to_string(length) + " tokens of " + row_name(from) +
                        " may have been rotated for a text of more than " + std::to_string(manifest_.rope_switch) +
                        " tokens", "Session", "reset the row and feed its tokens again");
    }
    if (length > 0 && length < least_length(from)) {
        throw Error("what " + row_name(from) + " would see at " + std::to_string(length) +
                        " tokens is no longer there: its windowed layers keep a window and " +
                        std::to_string(manifest_.prompt_chunk) + " tokens more", "Session",
                    "keep 0, or " + std::to_string(least_length(from)) + " to " + std::to_string(held) + " tokens");
    }
    if (device_) device_->make_current();
    auto const source = static_cast<std::int64_t>(from), destination = static_cast<std::int64_t>(to);
    if (from != to && length > 0) runner_.copy_row(source, destination, length);
    if (!manifest_.plugin) runner_.zero_row(destination, length);  // see forget: a row that overflowed leaves NaN
    lengths_[to] = length;
    ends_[to] = length > 0 ? ends_[from] : 0;
}

Logits Session::Rows::extend(std::vector<Tokens> const& more) {
    for (std::size_t row = 0; row < more.size(); ++row) {
        if (more[row].empty() || lengths_[row] == 0 || lengths_[row] >= least_length(row)) continue;
        throw Error("a run of " + row_name(row) + " failed after it had displaced what its windowed layers see",
                    "Session", "reset the row and feed its tokens again");
    }
    if (device_) device_->make_current();
    Logits logits(more.size(), static_cast<std::size_t>(manifest_.vocabulary));
    std::vector<std::int64_t> lengths = lengths_;
    std::size_t longest = 0;
    for (Tokens const& tokens : more) longest = std::max(longest, tokens.size());
    auto const part = static_cast<std::size_t>(manifest_.max_prompt);
    for (std::size_t begin = 0; begin < longest; begin += part) {
        Feed const feed = cut_out(more, begin, std::min(part, longest - begin), lengths);
        for (std::size_t row = 0; row < more.size(); ++row) {
            ends_[row] = std::max(ends_[row], lengths[row] + feed.new_lengths[row]);
        }
        void const* const raw = run(feed);
        for (std::size_t row = 0; row < more.size(); ++row) {
            lengths[row] += feed.new_lengths[row];
            bool const ended_here = more[row].size() > begin && more[row].size() <= begin + part;
            if (ended_here) copy_logits(raw, row, logits);
        }
    }
    lengths_ = std::move(lengths);  // only now: had a run failed, the rows would be as they were
    return logits;
}

void const* Session::Rows::run(Feed const& feed) {
    try {
        return runner_.run(feed);
    } catch (...) {
        if (communicator_) communicator_->leave();  // the others would wait for this rank for ever
        throw;
    }
}

Feed Session::Rows::cut_out(std::vector<Tokens> const& more, std::size_t begin, std::size_t steps,
                            std::vector<std::int64_t> const& lengths) const {
    Feed feed{static_cast<std::int64_t>(more.size()), static_cast<std::int64_t>(steps), {}, {}, {}};
    feed.ids.assign(more.size() * steps, 0);
    for (std::size_t row = 0; row < more.size(); ++row) {
        Tokens const& tokens = more[row];
        std::size_t const first = std::min(begin, tokens.size()), last = std::min(begin + steps, tokens.size());
        std::copy(tokens.data() + first, tokens.data() + last, feed.ids.data() + row * steps);
        feed.past_lengths.push_back(static_cast<std::int32_t>(lengths[row]));
        feed.new_lengths.push_back(static_cast<std::int32_t>(last - first));
    }
    return feed;
}

void Session::Rows::copy_logits(void const* raw, std::size_t row, Logits& logits) const {
    Number const number = runner_.logits_number();
    auto const* const bytes = static_cast<char const*>(raw) + row * logits.vocabulary() * bytes_of(number);
    float* const values = logits.row(row);
    to_fp32(number, bytes, logits.vocabulary(), values);
    if (std::none_of(values, values + logits.vocabulary(), [](float value) { return std::isnan(value); })) return;
    throw Error(row_name(row) + "'s logits are not numbers", "the engine's output",
                "the number format overflowed: build the engine from a bundle in bf16 or fp32 (--dtype)");
}

}  // namespace gqa
