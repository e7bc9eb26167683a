"""The graphsurgeon toolbox: passes that count their work, matching, editing, checking. No weight is ever read."""
