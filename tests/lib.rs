//! Integration tests of transfusion, grouped by what they need.
