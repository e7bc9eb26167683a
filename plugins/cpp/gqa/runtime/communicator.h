// One rank among the ranks of a bundle that is cut over devices: NCCL's communicator, and waiting for the other ranks,
// but not for ever, and not for one that failed.
//
// NCCL is loaded at run time; an ncclComm_t is an opaque pointer here, as it is in nccl.h, which is not needed.
// Source: NCCL API reference; nvinfer1::IExecutionContext::setCommunicator.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct ncclComm;  // ncclComm_t is ncclComm*

namespace gqa {

class Communicator {
public:
    static constexpr double kTimeoutSeconds = 120;
    using Id = std::array<char, 128>;  // an ncclUniqueId

    // Takes over an ncclComm_t, made with its rank's device current: it is destroyed with this object, or aborted when a
    // rank fails. The program must not destroy it.
    explicit Communicator(ncclComm* taken, double timeout_seconds = kTimeoutSeconds);
    ~Communicator();
    Communicator(Communicator const&) = delete;
    Communicator& operator=(Communicator const&) = delete;

    // Rank 0 makes an id and hands it to the others by whatever means the program has (MPI, a socket, a store); then all
    // join. The device of the calling thread becomes the rank's.
    static Id make_id();
    static std::shared_ptr<Communicator> join(Id const& id, int rank, int size,
                                              double timeout_seconds = kTimeoutSeconds);
    // The same with a file that all ranks can read: rank 0 writes it and removes it again.
    static std::shared_ptr<Communicator> join_by_file(std::string const& path, int rank, int size,
                                                      double timeout_seconds = kTimeoutSeconds);

    int rank() const { return rank_; }
    int size() const { return size_; }
    int device() const { return device_; }
    void* get() const;  // throws Error once it was aborted

    // Returns when `done` is true. Throws Error, the communicator aborted, when another rank fails or time is up.
    void wait(std::function<bool()> const& done, std::string const& doing);
    // Makes a call that returns only when every rank makes it, on a thread of its own with this thread's device.
    // Throws as wait, and what `work` throws. `work` must own what it uses: it may outlast this call.
    void call(std::function<void()> work, std::string const& doing);
    // What every rank gives, in order; as many bytes on each. Throws as wait.
    std::vector<std::string> gather(std::string const& mine, std::string const& doing);

    // Every rank says that it is ready for `order`, the hash of its collectives. Throws Error where a rank is not, or has
    // another order.
    void meet(std::string const& order);
    // This rank ends: tells those that wait in `meet`, and aborts, so that nothing waits here for the others.
    void leave() noexcept;

private:
    void abort() noexcept;
    [[noreturn]] void give_up(std::string const& what, std::string const& doing, std::string const& fix);
    std::vector<std::string> answers(bool ready, std::string const& order);

    std::atomic<ncclComm*> communicator_;
    double timeout_seconds_;
    int rank_ = 0, size_ = 1, device_ = 0;
    bool met_ = false;
};

}  // namespace gqa
