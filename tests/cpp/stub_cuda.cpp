// A stand-in for libcuda.so.1: memory is the host's, streams run at once, captured graphs are lists of functions.
//
// It is as strict as the driver where the runtime could go wrong: fresh memory is full of NaN, and allocating, loading
// or waiting fails while a stream is captured. A module's image is text, "NAME KIND KIND ...": a launch writes its
// arguments, by kind, into the log. Environment: GQA_STUB_LOG (file), GQA_STUB_CAPABILITY (89), GQA_STUB_SMS (128),
// GQA_STUB_CONTEXT_ID (1), GQA_STUB_FAIL (a symbol that fails), GQA_STUB_NO_GPU, GQA_STUB_GPUS (1), GQA_STUB_ASYNC
// (each stream runs its work on a thread of its own, as a GPU does; then nothing can be captured).
#include "stub_cuda.h"

#include <dlfcn.h>

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <thread>
#include <vector>

#include "gqa/cuda/driver.h"

using namespace gqa::cuda;
using Work = std::function<void()>;

struct CUctx_st {};

// Work that is done in order on a thread of its own.
class Worker {
public:
    Worker() : thread_([this] { run(); }) {}
    ~Worker() {
        put(nullptr);
        thread_.join();
    }
    void put(Work work) {
        std::lock_guard const guard(lock_);
        waiting_.push_back(std::move(work));
        ++open_;
        changed_.notify_all();
    }
    bool done() {
        std::lock_guard const guard(lock_);
        return open_ == 0;
    }
    void wait() {
        std::unique_lock guard(lock_);
        changed_.wait(guard, [this] { return open_ == 0; });
    }

private:
    void run() {
        for (;;) {
            std::unique_lock guard(lock_);
            changed_.wait(guard, [this] { return !waiting_.empty(); });
            Work const work = std::move(waiting_.front());
            waiting_.pop_front();
            guard.unlock();
            if (!work) return;
            work();
            guard.lock();
            --open_;
            changed_.notify_all();
        }
    }

    std::mutex lock_;
    std::condition_variable changed_;
    std::deque<Work> waiting_;
    int open_ = 0;
    std::thread thread_;
};

struct CUstream_st {
    std::unique_ptr<Worker> worker{std::getenv("GQA_STUB_ASYNC") ? new Worker : nullptr};
};
struct CUfunc_st {
    std::string name;
    std::vector<std::string> kinds;
};
struct CUmod_st {
    CUfunc_st function;
};
struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::vector<Work> work;
};

namespace {

constexpr Result kOutOfMemory = 2, kNoDevice = 100, kNotFound = 500, kNotWhileCapturing = 900, kNoContext = 201;
CUctx_st primary;
thread_local CUctx_st* current = nullptr;
CUgraph_st* capturing = nullptr;

int setting(char const* name, int otherwise) {
    char const* const text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

bool fails(char const* symbol) {
    char const* const wanted = std::getenv("GQA_STUB_FAIL");
    return wanted && std::strcmp(wanted, symbol) == 0;
}

std::string describe(std::string const& kind, void const* argument) {
    std::ostringstream out;
    if (kind[0] == '*') {
        std::uint64_t address;
        std::memcpy(&address, argument, sizeof address);
        out << address;
    } else if (kind == "i32") {
        std::int32_t value;
        std::memcpy(&value, argument, sizeof value);
        out << value;
    } else {
        float value;
        std::memcpy(&value, argument, sizeof value);
        out << std::hexfloat << value;
    }
    return out.str();
}

Result put(Stream stream, Work work) {
    gqa_stub_enqueue(stream, std::move(work));
    return kSuccess;
}

}  // namespace

void gqa_stub_log(std::string const& line) {
    if (char const* const path = std::getenv("GQA_STUB_LOG")) std::ofstream(path, std::ios::app) << line << "\n";
}

void gqa_stub_enqueue(CUstream_st* stream, std::function<void()> work) {
    if (capturing) {
        capturing->work.push_back(std::move(work));
    } else if (stream && stream->worker) {
        stream->worker->put(std::move(work));
    } else {
        work();
    }
}

#define STUB extern "C" __attribute__((visibility("default"))) Result

STUB cuInit(unsigned) { return std::getenv("GQA_STUB_NO_GPU") ? kNoDevice : kSuccess; }
// How cuda-bindings finds every other function. A symbol's newest version is the one that is called.
STUB cuGetProcAddress_v2(char const* symbol, void** function, int, std::uint64_t, int* status) {
    void* const self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *function = dlsym(self, (std::string(symbol) + "_v2").c_str());
    if (!*function) *function = dlsym(self, symbol);
    if (status) *status = *function ? 0 : 1;
    return *function ? kSuccess : kNotFound;
}
STUB cuDriverGetVersion(int* version) {
    *version = 13000;
    return kSuccess;
}
STUB cuGetErrorName(Result result, char const** text) {
    *text = result == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_STUB";
    return kSuccess;
}
STUB cuGetErrorString(Result, char const** text) {
    *text = "the stand-in was told to fail";
    return kSuccess;
}
STUB cuDeviceGet(Device* device, int ordinal) {
    *device = ordinal;
    return kSuccess;
}
STUB cuDeviceGetCount(int* count) {
    *count = setting("GQA_STUB_GPUS", 1);
    return kSuccess;
}
STUB cuDeviceGetAttribute(int* value, int attribute, Device) {
    int const capability = setting("GQA_STUB_CAPABILITY", 89);
    *value = attribute == kMultiprocessorCount ? setting("GQA_STUB_SMS", 128)
             : attribute == kCapabilityMajor   ? capability / 10
                                               : capability % 10;
    return kSuccess;
}
STUB cuDevicePrimaryCtxRetain(Context* context, Device) {
    *context = &primary;
    return kSuccess;
}
STUB cuDevicePrimaryCtxRelease_v2(Device) {
    gqa_stub_log("context released");
    return kSuccess;
}
STUB cuCtxGetCurrent(Context* context) {
    *context = current;
    return kSuccess;
}
STUB cuCtxSetCurrent(Context context) {
    current = context;
    return kSuccess;
}
STUB cuCtxGetId(Context, unsigned long long* id) {
    *id = static_cast<unsigned long long>(setting("GQA_STUB_CONTEXT_ID", 1));
    return kSuccess;
}
STUB cuCtxGetDevice(Device* device) {
    *device = 0;
    return current ? kSuccess : kNoContext;
}

STUB cuModuleLoadData(Module* module, void const* image) {
    if (capturing) return kNotWhileCapturing;
    if (fails("cuModuleLoadData")) return kNoDevice;
    auto* const loaded = new CUmod_st;
    std::istringstream words(static_cast<char const*>(image));
    words >> loaded->function.name;
    for (std::string kind; words >> kind;) loaded->function.kinds.push_back(kind);
    gqa_stub_log("module loaded " + loaded->function.name);
    *module = loaded;
    return kSuccess;
}
STUB cuModuleUnload(Module module) {
    gqa_stub_log("module unloaded " + module->function.name);
    delete module;
    return kSuccess;
}
STUB cuModuleGetFunction(Function* function, Module module, char const* name) {
    *function = &module->function;
    return module->function.name == name ? kSuccess : kNotFound;
}
STUB cuFuncSetAttribute(Function function, int attribute, int value) {
    gqa_stub_log("attribute " + function->name + " " + std::to_string(attribute) + " " + std::to_string(value));
    return kSuccess;
}
STUB cuLaunchKernel(Function function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y,
                    unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments, void**) {
    if (fails("cuLaunchKernel")) return kNoDevice;
    std::ostringstream line;
    line << "launch " << function->name << " grid " << x << " " << y << " " << z << " threads " << threads << " "
         << block_y << " " << block_z << " shared " << shared_bytes << " arguments";
    for (std::size_t i = 0; i < function->kinds.size(); ++i) line << " " << describe(function->kinds[i], arguments[i]);
    return put(stream, [text = line.str()] { gqa_stub_log(text); });
}

STUB cuMemAlloc_v2(Address* address, std::size_t bytes) {
    if (capturing) return kNotWhileCapturing;
    if (fails("cuMemAlloc_v2")) return kOutOfMemory;
    void* const memory = std::malloc(bytes ? bytes : 1);
    std::memset(memory, 0xff, bytes);  // NaN in every number format
    *address = reinterpret_cast<Address>(memory);
    gqa_stub_log("allocated " + std::to_string(bytes));
    return kSuccess;
}
STUB cuMemFree_v2(Address address) {
    std::free(reinterpret_cast<void*>(address));
    gqa_stub_log("freed");
    return kSuccess;
}
STUB cuMemAllocHost_v2(void** memory, std::size_t bytes) {
    *memory = std::malloc(bytes ? bytes : 1);
    return kSuccess;
}
STUB cuMemFreeHost(void* memory) {
    std::free(memory);
    return kSuccess;
}
STUB cuMemsetD8Async(Address address, unsigned char value, std::size_t bytes, Stream stream) {
    return put(stream, [=] { std::memset(reinterpret_cast<void*>(address), value, bytes); });
}
STUB cuMemcpyHtoDAsync_v2(Address address, void const* host, std::size_t bytes, Stream stream) {
    return put(stream, [=] { std::memcpy(reinterpret_cast<void*>(address), host, bytes); });
}
STUB cuMemcpyDtoHAsync_v2(void* host, Address address, std::size_t bytes, Stream stream) {
    return put(stream, [=] { std::memcpy(host, reinterpret_cast<void*>(address), bytes); });
}
STUB cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, Stream stream) {
    return put(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}

STUB cuStreamCreate(Stream* stream, unsigned) {
    *stream = new CUstream_st;
    return kSuccess;
}
STUB cuStreamDestroy_v2(Stream stream) {
    delete stream;
    return kSuccess;
}
STUB cuStreamSynchronize(Stream stream) {
    if (capturing) return kNotWhileCapturing;
    if (stream && stream->worker) stream->worker->wait();
    return kSuccess;
}
STUB cuStreamQuery(Stream stream) {
    return !stream || !stream->worker || stream->worker->done() ? kSuccess : kNotReady;
}
STUB cuStreamBeginCapture_v2(Stream stream, int) {
    if ((stream && stream->worker) || fails("cuStreamBeginCapture_v2")) return kNotWhileCapturing;
    capturing = new CUgraph_st;
    gqa_stub_log("capture begins");
    return kSuccess;
}
STUB cuStreamEndCapture(Stream, Graph* graph) {
    *graph = capturing;
    capturing = nullptr;
    gqa_stub_log("capture ends");
    return kSuccess;
}
STUB cuGraphInstantiateWithFlags(GraphExec* exec, Graph graph, unsigned long long) {
    if (fails("cuGraphInstantiateWithFlags")) return kOutOfMemory;
    *exec = new CUgraphExec_st{graph->work};
    return kSuccess;
}
STUB cuGraphLaunch(GraphExec exec, Stream) {
    gqa_stub_log("graph launched");
    for (Work const& work : exec->work) work();
    return kSuccess;
}
STUB cuGraphDestroy(Graph graph) {
    delete graph;
    return kSuccess;
}
STUB cuGraphExecDestroy(GraphExec exec) {
    gqa_stub_log("graph destroyed");
    delete exec;
    return kSuccess;
}
