#![no_std]
//! Map layouts and packet logic that the eBPF programs and the plugin share.
