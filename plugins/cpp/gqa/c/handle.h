// What a gqa_session of gqa_export.h is, for programs that make one of an engine of their own.
#pragma once

#include <utility>

#include "gqa/runtime/session.h"

struct gqa_session {
    explicit gqa_session(gqa::Session made) : session(std::move(made)) {}
    gqa::Session session;
};

namespace gqa::c {

// Keeps an error's text for gqa_last_error on this thread.
void remember(char const* text);

}  // namespace gqa::c
