/* A scheduler's calls and the choice of tokens, in C: prints what the test compares.
 *
 *   use_c MANIFEST        rows that join, go back and copy; generate; an error
 *   use_c choose          lines of "temperature top_k top_p min_p uniform logit ..." -> a token each
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <gqa_export.h>

gqa_session* toy_session(const char* path);

static int best(const float* logits, int64_t vocabulary) {
    gqa_sampling const greedy = {0, 0, 1, 0};
    return gqa_choose(logits, (size_t)vocabulary, &greedy, 0);
}

static int choose_lines(void) {
    static char line[1 << 16];
    static float logits[1 << 12];
    while (fgets(line, sizeof line, stdin)) {
        double numbers[5];
        char* at = line;
        for (int i = 0; i < 5; ++i) numbers[i] = strtod(at, &at);
        size_t count = 0;
        for (char* end;; at = end, ++count) {
            logits[count] = strtof(at, &end);
            if (end == at) break;
        }
        gqa_sampling const sampling = {numbers[0], (int64_t)numbers[1], numbers[2], numbers[3]};
        printf("%d\n", gqa_choose(logits, count, &sampling, numbers[4]));
    }
    return 0;
}

int main(int count, char** words) {
    if (count > 1 && strcmp(words[1], "choose") == 0) return choose_lines();
    gqa_session* const session = toy_session(words[1]);
    int64_t const vocabulary = gqa_vocabulary(session);
    float* const logits = malloc(sizeof(float) * (size_t)vocabulary * 3);
    int32_t const prompt[] = {3, 1, 4, 1, 5};
    size_t const counts[] = {3, 0, 2};
    printf("%d %lld %lld %lld\n", gqa_abi_version() == GQA_ABI_VERSION, (long long)vocabulary,
           (long long)gqa_capacity(session), (long long)gqa_max_batch(session));
    if (gqa_open(session, 3) || gqa_extend(session, prompt, counts, 3, logits)) return 1;
    printf("%d %d\n", best(logits, vocabulary), best(logits + 2 * vocabulary, vocabulary));
    int32_t const step[] = {9, GQA_NO_TOKEN, 2};
    if (gqa_copy_row(session, 0, 1, 2) || gqa_rewind_row(session, 0, 1) || gqa_step(session, step, 3, logits)) return 1;
    printf("%d %d\n", best(logits, vocabulary), best(logits + 2 * vocabulary, vocabulary));
    if (gqa_reset_row(session, 2)) return 1;
    printf("%zu: %lld %lld %lld %lld\n", gqa_rows(session), (long long)gqa_length(session, 0),
           (long long)gqa_length(session, 1), (long long)gqa_length(session, 2), (long long)gqa_length(session, 3));
    uint64_t seed = 0;
    if (gqa_shared_seed(session, 7, &seed) || seed != 7) return 1; /* without ranks */
    int const failed = gqa_rewind_row(session, 0, 9);
    printf("%d %s\n", failed, gqa_last_error());
    int32_t written[6];
    size_t many = 0;
    if (gqa_generate(session, prompt, 3, 6, written, &many)) return 1;
    for (size_t i = 0; i < many; ++i) printf("%d ", written[i]);
    printf("\n");

    /* A second session in the same process has rows of its own, and what a program does wrong is an error. */
    gqa_session* const other = toy_session(words[1]);
    if (gqa_open(other, 1) || gqa_extend(other, prompt + 3, counts + 2, 1, logits)) return 1;
    printf("%d %lld %zu %zu\n", best(logits, vocabulary), (long long)gqa_length(other, 0), gqa_rows(other),
           gqa_rows(session));
    printf("%d %s", gqa_step(NULL, step, 3, logits), gqa_last_error());
    printf(" | %d %s", gqa_step(other, NULL, 1, logits), gqa_last_error());
    printf(" | %d", gqa_extend(other, NULL, counts, 1, logits));
    printf(" | %lld %zu %d\n", (long long)gqa_length(NULL, 0), gqa_rows(NULL), gqa_choose(NULL, 0, NULL, 0));
    gqa_free(other);
    gqa_free(NULL);
    free(logits);
    gqa_free(session);
    return 0;
}
