#include <algorithm>
#include <exception>
#include <string>
#include <vector>

#include "gqa/c/handle.h"
#include "gqa/core/error.h"
#include "gqa/runtime/sampling.h"
#include "gqa_export.h"

namespace {

thread_local std::string last_error;

// Refuses a null pointer: a program in C that went on after gqa_load failed is to get an error, and not to crash.
void need(void const* pointer, char const* what) {
    if (!pointer) throw gqa::Error(std::string(what) + " is NULL", "gqa_export.h", "check what gqa_load returned");
}

// Runs `work`; 0, or 1 and the error's text kept.
template <typename Work>
int guarded(gqa_session const* session, Work work) {
    try {
        need(session, "the session");
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

int64_t gqa_vocabulary(const gqa_session* session) { return session ? session->session.manifest().vocabulary : -1; }
int64_t gqa_capacity(const gqa_session* session) { return session ? session->session.manifest().capacity : -1; }
int64_t gqa_max_batch(const gqa_session* session) { return session ? session->session.manifest().max_batch : -1; }
size_t gqa_rows(const gqa_session* session) { return session ? session->session.lengths().size() : 0; }

int64_t gqa_length(const gqa_session* session, size_t row) {
    if (!session) return -1;
    auto const& lengths = session->session.lengths();
    return row < lengths.size() ? lengths[row] : -1;
}

int gqa_shared_seed(gqa_session* session, uint64_t seed, uint64_t* shared) {
    return guarded(session, [&] {
        need(shared, "shared");
        *shared = session->session.shared_seed(seed);
    });
}

int gqa_open(gqa_session* session, size_t rows) {
    return guarded(session, [&] { session->session.open(rows); });
}

int gqa_extend(gqa_session* session, const int32_t* tokens, const size_t* counts, size_t rows, float* logits) {
    return guarded(session, [&] {
        need(counts, "counts");
        std::vector<gqa::Tokens> more;
        for (size_t row = 0; row < rows; ++row) {
            if (counts[row]) need(tokens, "tokens");
            more.emplace_back(tokens, tokens + counts[row]);
            if (tokens) tokens += counts[row];
        }
        give(session->session.extend(more), logits);
    });
}

int gqa_step(gqa_session* session, const int32_t* tokens, size_t rows, float* logits) {
    return guarded(session, [&] {
        need(tokens, "tokens");
        give(session->session.step(gqa::Tokens(tokens, tokens + rows)), logits);
    });
}

int gqa_reset_row(gqa_session* session, size_t row) {
    return guarded(session, [&] { session->session.reset_row(row); });
}

int gqa_rewind_row(gqa_session* session, size_t row, int64_t length) {
    return guarded(session, [&] { session->session.rewind_row(row, length); });
}

int gqa_copy_row(gqa_session* session, size_t from, size_t to, int64_t length) {
    return guarded(session, [&] { session->session.copy_row(from, to, length); });
}

int gqa_generate(gqa_session* session, const int32_t* prompt, size_t prompt_tokens, int64_t most, int32_t* new_tokens,
                 size_t* count) {
    return guarded(session, [&] {
        need(prompt, "prompt");
        need(new_tokens, "new_tokens");
        need(count, "count");
        gqa::GenerateOptions options;
        options.max_new_tokens = most;
        auto const written = session->session.generate({gqa::Tokens(prompt, prompt + prompt_tokens)}, options);
        std::copy(written[0].begin(), written[0].end(), new_tokens);
        *count = written[0].size();
    });
}

int32_t gqa_choose(const float* logits, size_t vocabulary, const gqa_sampling* sampling, double uniform) {
    if (!logits || !sampling || !vocabulary) {
        gqa::c::remember("gqa_choose needs logits of at least one token, and a sampling");
        return GQA_NO_TOKEN;
    }
    gqa::Sampling const wanted{sampling->temperature, sampling->top_k, sampling->top_p, sampling->min_p};
    return gqa::choose(logits, vocabulary, wanted, uniform);
}
