// A step of the toy model on one of several ranks, put on a stream as an engine puts its own: read, all_reduce, answer.
// NCCL is called as TensorRT calls it: its library is found by name.
//
// Environment: GQA_TOY_BREAK, "WHERE" or "WHERE:N": join (this rank's engine refuses the communicator), enqueue (its Nth
// run, counted from 0, is refused), late (its Nth run begins after five seconds), die (its process ends in its Nth run).
#pragma once

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "stub_cuda.h"
#include "toy_model.h"

namespace toy {

using AllReduce = int(void const* from, void* into, std::size_t count, int type, int operation, void* communicator,
                      CUstream_st* stream);

inline bool breaks(std::string const& where, int count = 0) {
    char const* const text = std::getenv("GQA_TOY_BREAK");
    std::string const wanted = text ? text : "";
    return wanted == where || wanted == where + ":" + std::to_string(count);
}

inline void enqueue_rank(ToyCall const& call, CUstream_st* stream, int count) {
    static auto* const library = dlopen("libnccl.so.2", RTLD_NOW);
    static auto* const all_reduce = reinterpret_cast<AllReduce*>(dlsym(library, "ncclAllReduce"));
    auto const rows = static_cast<std::size_t>(call.tensors.at("input_ids").shape[0]);
    auto sums = std::make_shared<std::vector<float>>(rows);
    if (breaks("die", count)) std::_Exit(9);
    if (breaks("late", count)) std::this_thread::sleep_for(std::chrono::seconds(5));
    gqa_stub_enqueue(stream, [call, sums] {
        gqa_stub_log("run profile " + std::to_string(call.profile));
        call.read(sums->data());
    });
    all_reduce(sums->data(), sums->data(), rows, 7, 0, call.communicator, stream);
    gqa_stub_enqueue(stream, [call, sums] { call.answer(sums->data()); });
}

}  // namespace toy
