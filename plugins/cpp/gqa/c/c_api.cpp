#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "gqa/c/handle.h"
#include "gqa/runtime/sampling.h"
#include "gqa_export.h"

namespace {

thread_local std::string last_error;

// Runs `work`; 0, or 1 and the error's text kept.
template <typename Work>
int guarded(Work work) {
    try {
        work();
        return 0;
    } catch (std::exception const& error) {
        gqa::c::remember(error.what());
    } catch (...) {
        gqa::c::remember("an error without a text");
    }
    return 1;
}

void give(gqa::Logits const& found, float* logits) {
    if (logits && found.rows()) std::copy(found.row(0), found.row(0) + found.rows() * found.vocabulary(), logits);
}

}  // namespace

void gqa::c::remember(char const* text) { last_error = text; }

int gqa_abi_version(void) { return GQA_ABI_VERSION; }
const char* gqa_last_error(void) { return last_error.c_str(); }
void gqa_free(gqa_session* session) { delete session; }

int64_t gqa_vocabulary(const gqa_session* session) { return session->session.manifest().vocabulary; }
int64_t gqa_capacity(const gqa_session* session) { return session->session.manifest().capacity; }
int64_t gqa_max_batch(const gqa_session* session) { return session->session.manifest().max_batch; }
size_t gqa_rows(const gqa_session* session) { return session->session.lengths().size(); }

int64_t gqa_length(const gqa_session* session, size_t row) {
    auto const& lengths = session->session.lengths();
    return row < lengths.size() ? lengths[row] : -1;
}

int gqa_shared_seed(gqa_session* session, uint64_t seed, uint64_t* shared) {
    return guarded([&] { *shared = session->session.shared_seed(seed); });
}

int gqa_open(gqa_session* session, size_t rows) {
    return guarded([&] { session->session.open(rows); });
}

int gqa_extend(gqa_session* session, const int32_t* tokens, const size_t* counts, size_t rows, float* logits) {
    return guarded([&] {
        std::vector<gqa::Tokens> more;
        for (size_t row = 0; row < rows; ++row) {
            more.emplace_back(tokens, tokens + counts[row]);
            tokens += counts[row];
        }
        give(session->session.extend(more), logits);
    });
}

int gqa_step(gqa_session* session, const int32_t* tokens, size_t rows, float* logits) {
    return guarded([&] { give(session->session.step(gqa::Tokens(tokens, tokens + rows)), logits); });
}

int gqa_reset_row(gqa_session* session, size_t row) {
    return guarded([&] { session->session.reset_row(row); });
}

int gqa_rewind_row(gqa_session* session, size_t row, int64_t length) {
    return guarded([&] { session->session.rewind_row(row, length); });
}

int gqa_copy_row(gqa_session* session, size_t from, size_t to, int64_t length) {
    return guarded([&] { session->session.copy_row(from, to, length); });
}

int gqa_generate(gqa_session* session, const int32_t* prompt, size_t prompt_tokens, int64_t most, int32_t* new_tokens,
                 size_t* count) {
    return guarded([&] {
        gqa::GenerateOptions options;
        options.max_new_tokens = most;
        auto const written = session->session.generate({gqa::Tokens(prompt, prompt + prompt_tokens)}, options);
        std::copy(written[0].begin(), written[0].end(), new_tokens);
        *count = written[0].size();
    });
}

int32_t gqa_choose(const float* logits, size_t vocabulary, const gqa_sampling* sampling, double uniform) {
    gqa::Sampling const wanted{sampling->temperature, sampling->top_k, sampling->top_p, sampling->min_p};
    return gqa::choose(logits, vocabulary, wanted, uniform);
}
