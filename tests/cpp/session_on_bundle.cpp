// session_on_bundle FOLDER [PLUGIN_LIBRARY]: a Session through Session::load, as a program would have it.
#include "session_script.h"

int main(int count, char** words) {
    try {
        gqa::Options options;
        if (count > 2) options.plugin_library = words[2];
        gqa::Session session = gqa::Session::load(words[1], options);
        script::run(session);
        return 0;
    } catch (gqa::Error const& error) {
        script::print_error(error);
        return 2;
    }
}
