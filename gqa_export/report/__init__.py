"""What a validation leaves on paper: JSON with a stable schema, JUnit XML, a self-contained HTML page, a summary for a
CI system; and the baseline that turns a drift within the tolerance into a failure. Reads verdicts, judges nothing."""
