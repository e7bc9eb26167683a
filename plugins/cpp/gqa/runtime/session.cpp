#include "gqa/runtime/session.h"

#include <algorithm>
#include <utility>

#include "gqa/runtime/meeting.h"
#include "gqa/runtime/rows.h"

namespace gqa {

Token Logits::best(std::size_t index) const {
    float const* const values = row(index);
    return static_cast<Token>(std::max_element(values, values + vocabulary_) - values);
}

Session::Session() = default;

Session::Session(Manifest manifest, std::unique_ptr<Engine> engine, Options const& options) {
    meeting(options, [&] {
        check_ranks(manifest, options, "Session");
        meet(manifest, options);
        rows_ = std::make_unique<Rows>(std::move(manifest), nullptr, std::move(engine), options);
    });
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

Manifest const& Session::manifest() const { return rows_->manifest(); }
std::vector<std::int64_t> const& Session::lengths() const { return rows_->lengths(); }
std::uint64_t Session::shared_seed(std::uint64_t seed) { return rows_->shared_seed(seed); }

Logits Session::begin(std::vector<Tokens> const& prompts, std::int64_t reserve) {
    rows_->check_batch(prompts.size());
    for (std::size_t row = 0; row < prompts.size(); ++row) {
        if (!prompts[row].empty()) continue;
        throw Error("row " + std::to_string(row) + " has no tokens", "Session::prefill", "pass a prompt of at least 1");
    }
    rows_->check_fits(std::vector<std::int64_t>(prompts.size(), 0), prompts, reserve);
    rows_->forget(prompts.size());
    return rows_->extend(prompts);
}

Logits Session::prefill(std::vector<Tokens> const& prompts) { return begin(prompts, 0); }

Logits Session::extend(std::vector<Tokens> const& more) {
    rows_->check_fits(rows_->lengths(), more, 0);
    return rows_->extend(more);
}

Logits Session::step(Tokens const& tokens) {
    std::vector<Tokens> more;
    for (Token token : tokens) more.push_back(token == no_token ? Tokens{} : Tokens{token});
    return extend(more);
}

void Session::open(std::size_t rows) {
    rows_->check_batch(rows);
    rows_->forget(rows);
}

void Session::reset_row(std::size_t row) { rows_->keep(row, row, 0); }

void Session::rewind_row(std::size_t row, std::int64_t length) { rows_->keep(row, row, length); }

void Session::copy_row(std::size_t from, std::size_t to, std::int64_t length) {
    bool const all = length == whole_row && from < lengths().size();
    rows_->keep(from, to, all ? lengths()[from] : length);
}

std::vector<Tokens> Session::generate(std::vector<Tokens> const& prompts, GenerateOptions const& options) {
    if (options.max_new_tokens < 1) {
        throw Error("max_new_tokens is " + std::to_string(options.max_new_tokens), "Session::generate",
                    "ask for at least 1");
    }
    Tokens const& ends = options.end_tokens.empty() ? manifest().end_tokens : options.end_tokens;
    Logits logits = begin(prompts, options.max_new_tokens - 1);  // the last token is never read back
    std::vector<Tokens> written(prompts.size());
    Tokens next(prompts.size(), 0);  // what each row reads next; no_token once it has ended
    for (std::int64_t count = 1;; ++count) {
        for (std::size_t row = 0; row < prompts.size(); ++row) {
            if (next[row] == no_token) continue;
            Token const token =
                options.choose ? options.choose(row, logits.row(row), logits.vocabulary()) : logits.best(row);
            rows_->check_token(row, token);
            written[row].push_back(token);
            bool const wanted = !options.on_token || options.on_token(row, token);
            bool const ended = std::find(ends.begin(), ends.end(), token) != ends.end();
            next[row] = wanted && !ended ? token : no_token;
        }
        bool const all_ended = std::all_of(next.begin(), next.end(), [](Token token) { return token == no_token; });
        if (all_ended || count == options.max_new_tokens) return written;
        logits = step(next);
    }
}

}  // namespace gqa
