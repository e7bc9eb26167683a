// A stand-in for libnccl.so.2: ranks are processes that meet in files. An id is the number of the process that made it
// and a count; its folder, below GQA_STUB_NCCL_FOLDER, has a file for each rank and meeting. Work is put on the stream,
// as NCCL puts its kernels, and waits there until every rank's file is there, or the communicator is aborted.
//
// Environment: GQA_STUB_LOG (as of the stand-in for CUDA), GQA_STUB_NCCL_SILENT (other ranks do not learn of an abort, as
// between GPUs of one machine), GQA_STUB_NCCL_STUCK (destroying a communicator never returns).
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <thread>
#include <vector>

#include "stub_cuda.h"

namespace files = std::filesystem;

struct UniqueId {
    char internal[128];
};

struct ncclComm {
    files::path folder;
    int rank, size;
    std::atomic<bool> aborted{false};
    int meetings = 0;
};

namespace {

constexpr int kSuccess = 0, kSystemError = 2, kRemoteError = 6;

// What a rank put down for a meeting, written whole or not at all.
void write(files::path const& path, std::string const& data) {
    files::path const part = path.string() + ".part";
    std::ofstream(part, std::ios::binary) << data;
    files::rename(part, path);
}

std::string read(files::path const& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// Waits until `there`; false where the communicator was aborted first.
bool wait(ncclComm const& communicator, std::function<bool()> const& there) {
    while (!there()) {
        if (communicator.aborted) return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

// Every rank's data of the next meeting, on the stream; then `use`.
void meet(ncclComm* communicator, CUstream_st* stream, std::function<std::string()> mine,
          std::function<void(std::vector<std::string> const&)> use) {
    std::string const name = "meeting" + std::to_string(communicator->meetings++) + ".";
    gqa_stub_enqueue(stream, [=] {
        if (communicator->aborted) return;
        auto const place = [&](int rank) { return communicator->folder / (name + std::to_string(rank)); };
        write(place(communicator->rank), mine());
        std::vector<std::string> found;
        for (int rank = 0; rank < communicator->size; ++rank) {
            if (!wait(*communicator, [&] { return files::exists(place(rank)); })) return;
            found.push_back(read(place(rank)));
        }
        use(found);
    });
}

}  // namespace

#define STUB extern "C" __attribute__((visibility("default")))

STUB int ncclGetUniqueId(UniqueId* id) {
    static int count = 0;
    std::memset(id, 0, sizeof *id);
    std::string const name = std::to_string(getpid()) + "-" + std::to_string(count++);
    name.copy(id->internal, sizeof id->internal - 1);
    return kSuccess;
}
STUB int ncclCommInitRank(ncclComm** made, int size, UniqueId id, int rank) {
    files::path const folder = files::path(std::getenv("GQA_STUB_NCCL_FOLDER")) / id.internal;
    files::create_directories(folder);
    auto* const communicator = new ncclComm{folder, rank, size, {}, 0};
    auto const place = [&](int one) { return folder / ("rank" + std::to_string(one)); };
    write(place(rank), "");
    for (int one = 0; one < size; ++one) wait(*communicator, [&] { return files::exists(place(one)); });
    gqa_stub_log("nccl init " + std::to_string(rank) + " of " + std::to_string(size));
    *made = communicator;
    return kSuccess;
}
STUB int ncclCommUserRank(ncclComm const* communicator, int* rank) {
    *rank = communicator->rank;
    return kSuccess;
}
STUB int ncclCommCount(ncclComm const* communicator, int* count) {
    *count = communicator->size;
    return kSuccess;
}
STUB int ncclCommCuDevice(ncclComm const* communicator, int* device) {
    *device = communicator->rank;
    return kSuccess;
}
STUB int ncclCommGetAsyncError(ncclComm* communicator, int* error) {
    *error = kSuccess;
    for (int rank = 0; rank < communicator->size; ++rank) {
        if (files::exists(communicator->folder / ("aborted" + std::to_string(rank)))) *error = kRemoteError;
    }
    return kSuccess;
}
STUB int ncclCommAbort(ncclComm* communicator) {
    gqa_stub_log("nccl abort");
    communicator->aborted = true;  // kept: what is on a stream still looks at it
    if (!std::getenv("GQA_STUB_NCCL_SILENT")) {
        write(communicator->folder / ("aborted" + std::to_string(communicator->rank)), "");
    }
    return kSuccess;
}
STUB int ncclCommDestroy(ncclComm* communicator) {
    gqa_stub_log("nccl destroy");
    // as NCCL does for a rank of the same machine that is gone
    while (std::getenv("GQA_STUB_NCCL_STUCK")) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    delete communicator;
    return kSuccess;
}
STUB char const* ncclGetErrorString(int error) {
    return error == kRemoteError ? "remote process exited or there was a network error" : "unhandled system error";
}
STUB int ncclAllGather(void const* mine, void* all, std::size_t count, int type, ncclComm* communicator,
                       CUstream_st* stream) {
    if (type != 1) return kSystemError;  // ncclUint8
    meet(communicator, stream, [=] { return std::string(static_cast<char const*>(mine), count); },
         [=](std::vector<std::string> const& found) {
             for (std::size_t rank = 0; rank < found.size(); ++rank) {
                 std::memcpy(static_cast<char*>(all) + rank * count, found[rank].data(), count);
             }
         });
    return kSuccess;
}
STUB int ncclAllReduce(void const* from, void* into, std::size_t count, int type, int operation,
                       ncclComm* communicator, CUstream_st* stream) {
    if (type != 7 || operation != 0) return kSystemError;  // ncclFloat32, ncclSum
    std::size_t const bytes = count * sizeof(float);
    meet(communicator, stream, [=] { return std::string(static_cast<char const*>(from), bytes); },
         [=](std::vector<std::string> const& found) {
             std::vector<float> sum(count, 0.0f), one(count);
             for (std::string const& data : found) {
                 std::memcpy(one.data(), data.data(), bytes);
                 for (std::size_t i = 0; i < count; ++i) sum[i] += one[i];
             }
             std::memcpy(into, sum.data(), bytes);
         });
    return kSuccess;
}
