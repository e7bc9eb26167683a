// rank_on_bundle FOLDER RANK RANKS MEETING_FILE TIMEOUT: the Session of one rank through Session::load.
#include "gqa/cuda/memory.h"
#include "session_script.h"

int main(int, char** words) {
    try {
        gqa::Options options;
        options.device = std::stoi(words[2]);
        gqa::cuda::DeviceContext const device(options.device);
        options.communicator =
            gqa::Communicator::join_by_file(words[4], options.device, std::stoi(words[3]), std::stod(words[5]));
        gqa::Session session = gqa::Session::load(words[1], options);
        script::run(session);
    } catch (gqa::Error const& error) {
        script::print_error(error);
        std::_Exit(2);
    }
    std::_Exit(0);
}
