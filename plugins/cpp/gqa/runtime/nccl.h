// NCCL's functions that are used here, found in libnccl.so.2 when first asked for. Declared by hand: they are NCCL's
// stable binary interface. Source: NCCL API reference.
#pragma once

#include <cstddef>
#include <string>

#include "gqa/cuda/driver.h"
#include "gqa/runtime/communicator.h"

namespace gqa::nccl {

using Result = int;  // ncclResult_t
constexpr Result kSuccess = 0, kInProgress = 7;
constexpr int kUint8 = 1;  // ncclDataType_t

struct UniqueId {  // ncclUniqueId: handed over by value
    char internal[128];
};

// X(name here, symbol, result, parameters)
#define GQA_NCCL_FUNCTIONS(X)                                                                                        \
    X(get_unique_id, "ncclGetUniqueId", Result, (UniqueId*))                                                         \
    X(init_rank, "ncclCommInitRank", Result, (ncclComm**, int size, UniqueId, int rank))                             \
    X(user_rank, "ncclCommUserRank", Result, (ncclComm const*, int*))                                                \
    X(count, "ncclCommCount", Result, (ncclComm const*, int*))                                                       \
    X(device, "ncclCommCuDevice", Result, (ncclComm const*, int*))                                                   \
    X(async_error, "ncclCommGetAsyncError", Result, (ncclComm*, Result*))                                            \
    X(abort, "ncclCommAbort", Result, (ncclComm*))                                                                   \
    X(destroy, "ncclCommDestroy", Result, (ncclComm*))                                                               \
    X(all_gather, "ncclAllGather", Result,                                                                           \
      (void const* mine, void* all, std::size_t count, int type, ncclComm*, cuda::Stream))                           \
    X(error_string, "ncclGetErrorString", char const*, (Result))

struct Functions {
#define GQA_NCCL_MEMBER(name, symbol, result, parameters) result(*name) parameters;
    GQA_NCCL_FUNCTIONS(GQA_NCCL_MEMBER)
#undef GQA_NCCL_MEMBER
};

// NCCL, loaded by the first call. Throws Error with the fix where there is none.
Functions const& functions();

// Throws Error for any result but success. doing: "joining the other ranks".
void check(Result result, std::string const& doing);

}  // namespace gqa::nccl
