//! Bytes to types and back, for every outside format kvroute speaks.
