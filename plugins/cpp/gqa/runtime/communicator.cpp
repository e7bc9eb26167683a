#include "gqa/runtime/communicator.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <thread>
#include <utility>

#include "gqa/core/error.h"
#include "gqa/cuda/memory.h"
#include "gqa/runtime/nccl.h"

namespace gqa {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kAgain[] = "start all ranks again";
constexpr double kGraceSeconds = 5;  // for what still runs when a communicator was aborted

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

// Waits a fiftieth of the time that was waited already: short runs are noticed at once, long ones cost no processor.
void pause(Clock::time_point began) {
    std::this_thread::sleep_for(std::chrono::duration<double>(std::clamp(seconds_since(began) / 50, 20e-6, 0.01)));
}

std::string text_of(double seconds) {
    char text[32];
    std::snprintf(text, sizeof text, "%g s", seconds);
    return text;
}

// What a call on a thread of its own leaves behind.
struct Outcome {
    std::atomic<bool> done{false};
    std::exception_ptr error;
};

std::shared_ptr<Outcome> start(std::function<void()> work) {
    auto outcome = std::make_shared<Outcome>();
    cuda::Context context = nullptr;
    cuda::check(cuda::driver().context_get_current(&context), "asking for the GPU of this thread");
    std::thread([outcome, context, work = std::move(work)] {
        try {
            cuda::check(cuda::driver().context_set_current(context), "choosing the GPU");
            work();
        } catch (...) {
            outcome->error = std::current_exception();
        }
        outcome->done = true;
    }).detach();
    return outcome;
}

// What a gathering needs; owned by the thread that makes the call too, which may end later than it is waited for.
struct Exchange {
    Exchange(std::size_t bytes, std::size_t ranks)
        : own(bytes, stream.get()), all(bytes * ranks, stream.get()), there(bytes), back(bytes * ranks) {}
    cuda::OwnedStream stream;
    cuda::DeviceMemory own, all;
    cuda::PinnedMemory there, back;
};

std::string others(double seconds) { return "the other ranks were not there within " + text_of(seconds); }

}  // namespace

Communicator::Communicator(ncclComm* taken, double timeout_seconds)
    : communicator_(taken), timeout_seconds_(timeout_seconds) {
    if (!taken) throw Error("the communicator is a null pointer", "Communicator", "give an ncclComm_t of ncclCommInitRank");
    auto const& nccl = nccl::functions();
    nccl::check(nccl.user_rank(taken, &rank_), "asking the communicator for its rank");
    nccl::check(nccl.count(taken, &size_), "asking the communicator for its ranks");
    nccl::check(nccl.device(taken, &device_), "asking the communicator for its GPU");
}

// Destroying waits for the other ranks of this machine, and one of them may be gone.
Communicator::~Communicator() {
    ncclComm* const last = communicator_.exchange(nullptr);
    if (!last) return;
    auto const done = std::make_shared<std::atomic<bool>>(false);
    try {
        std::thread([last, done] {
            nccl::functions().destroy(last);
            *done = true;
        }).detach();
    } catch (...) {  // no thread can be made: what is left belongs to the process
        return;
    }
    for (auto const began = Clock::now(); !*done && seconds_since(began) < timeout_seconds_;) pause(began);
}

Communicator::Id Communicator::make_id() {
    nccl::UniqueId made{};
    nccl::check(nccl::functions().get_unique_id(&made), "making the id of the ranks' meeting");
    Id id;
    std::copy(std::begin(made.internal), std::end(made.internal), id.begin());
    return id;
}

std::shared_ptr<Communicator> Communicator::join(Id const& id, int rank, int size, double timeout_seconds) {
    // Ranks connect here, where they are waited for with a limit, and not in their first collective (NCCL 2.22 and later).
    ::setenv("NCCL_RUNTIME_CONNECT", "0", 0);
    nccl::UniqueId wanted{};
    std::copy(id.begin(), id.end(), std::begin(wanted.internal));
    auto const& nccl = nccl::functions();
    auto const made = std::make_shared<std::atomic<ncclComm*>>(nullptr);
    auto const began = Clock::now();
    auto const outcome = start([=, &nccl] {
        ncclComm* communicator = nullptr;
        nccl::check(nccl.init_rank(&communicator, size, wanted, rank), "joining the other ranks");
        *made = communicator;
    });
    while (!outcome->done) {
        if (seconds_since(began) > timeout_seconds) {
            throw Error(others(timeout_seconds), "rank " + std::to_string(rank) + ", joining the other ranks", kAgain);
        }
        pause(began);
    }
    if (outcome->error) std::rethrow_exception(outcome->error);
    return std::make_shared<Communicator>(*made, timeout_seconds);
}

std::shared_ptr<Communicator> Communicator::join_by_file(std::string const& path, int rank, int size,
                                                         double timeout_seconds) {
    Id id{};
    if (rank == 0) {
        if (std::ifstream(path)) {
            throw Error("the file for the ranks' meeting is there already", path,
                        "remove it: it is of ranks that were started before");
        }
        id = make_id();
        std::string const whole = path + ".part";
        std::ofstream(whole, std::ios::binary).write(id.data(), static_cast<std::streamsize>(id.size()));
        if (std::rename(whole.c_str(), path.c_str()) != 0) {
            throw Error("cannot write the file for the ranks' meeting", path, "name one in a folder that all ranks can read");
        }
    }
    auto const began = Clock::now();
    for (bool read = rank == 0; !read;) {
        std::ifstream file(path, std::ios::binary);
        read = static_cast<bool>(file.read(id.data(), static_cast<std::streamsize>(id.size())));
        if (!read && seconds_since(began) > timeout_seconds) {
            throw Error("rank 0 did not write the file for the ranks' meeting within " + text_of(timeout_seconds), path,
                        "give every rank the same file, in a folder that all can read, and start rank 0 too");
        }
        if (!read) pause(began);
    }
    struct Removed {
        std::string const& path;
        bool mine;
        ~Removed() {
            if (mine) std::remove(path.c_str());
        }
    } const removed{path, rank == 0};
    return join(id, rank, size, timeout_seconds);
}

void* Communicator::get() const {
    if (ncclComm* const now = communicator_) return now;
    throw Error("this rank has left the others after a failure", "rank " + std::to_string(rank_), kAgain);
}

void Communicator::wait(std::function<bool()> const& done, std::string const& doing) {
    auto const began = Clock::now();
    auto const& nccl = nccl::functions();
    while (!done()) {
        nccl::Result state = nccl::kSuccess;
        nccl::Result const asked = nccl.async_error(static_cast<ncclComm*>(get()), &state);
        for (nccl::Result const result : {asked, state}) {
            if (result == nccl::kSuccess || result == nccl::kInProgress) continue;
            if (done()) return;  // meanwhile: what this rank waits for needs the others no more
            give_up(std::string("another rank failed: ") + nccl.error_string(result), doing,
                    "see the other ranks' own messages; start all ranks again");
        }
        if (seconds_since(began) > timeout_seconds_) give_up(others(timeout_seconds_), doing, kAgain);
        pause(began);
    }
}

void Communicator::call(std::function<void()> work, std::string const& doing) {
    auto const outcome = start(std::move(work));
    try {
        wait([&] { return outcome->done.load(); }, doing);
    } catch (Error const&) {
        for (auto const began = Clock::now(); !outcome->done && seconds_since(began) < kGraceSeconds;) pause(began);
        throw;
    }
    if (outcome->error) std::rethrow_exception(outcome->error);
}

std::vector<std::string> Communicator::gather(std::string const& mine, std::string const& doing) {
    cuda::DeviceContext const device(device_);
    std::size_t const bytes = mine.size(), ranks = static_cast<std::size_t>(size_);
    auto const here = std::make_shared<Exchange>(bytes, ranks);
    std::memcpy(here->there.as<void>(), mine.data(), bytes);
    auto const communicator = static_cast<ncclComm*>(get());
    // The first collective of a communicator may connect the ranks: it returns when they are there.
    call([=] {
        auto const& driver = cuda::driver();
        auto const pointer = [](cuda::DeviceMemory const& memory) { return reinterpret_cast<void*>(memory.address()); };
        cuda::Stream const stream = here->stream.get();
        cuda::check(driver.to_device(here->own.address(), here->there.as<void>(), bytes, stream), doing.c_str());
        nccl::check(nccl::functions().all_gather(pointer(here->own), pointer(here->all), bytes, nccl::kUint8, communicator,
                                                 stream), doing);
        cuda::check(driver.to_host(here->back.as<void>(), here->all.address(), bytes * ranks, stream), doing.c_str());
    }, doing);
    wait([&] { return here->stream.done(); }, doing);
    std::vector<std::string> found;
    for (std::size_t rank = 0; rank < ranks; ++rank) found.emplace_back(here->back.as<char>() + rank * bytes, bytes);
    return found;
}

std::vector<std::string> Communicator::answers(bool ready, std::string const& order) {
    met_ = true;
    std::string mine(1 + 64, '\0');  // a byte, and a sha256 in hexadecimal
    mine[0] = ready ? 1 : 0;
    order.copy(mine.data() + 1, 64);
    return gather(mine, "meeting the other ranks");
}

void Communicator::meet(std::string const& order) {
    std::vector<std::string> const found = answers(true, order);
    for (std::size_t rank = 0; rank < found.size(); ++rank) {
        std::string const name = "rank " + std::to_string(rank);
        if (found[rank][0] == 0) {
            give_up(name + " could not open its engine", "meeting the other ranks",
                    "see that rank's own message; start all ranks again");
        }
        if (found[rank].compare(1, 64, found[0], 1, 64) == 0) continue;
        give_up("the collectives of " + name + " are not those of rank 0: they would wait for one another for ever",
                "meeting the other ranks", "start every rank on the same bundle");
    }
}

void Communicator::leave() noexcept {
    try {
        if (!met_ && communicator_.load()) answers(false, "");
    } catch (...) {  // the reason why this rank ends is another one, and is what its program gets to see
    }
    abort();
}

void Communicator::abort() noexcept {
    if (ncclComm* const last = communicator_.exchange(nullptr)) nccl::functions().abort(last);
}

void Communicator::give_up(std::string const& what, std::string const& doing, std::string const& fix) {
    abort();
    throw Error(what, "rank " + std::to_string(rank_) + ", " + doing, fix);
}

}  // namespace gqa
