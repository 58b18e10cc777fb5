//! The brain end to end.
