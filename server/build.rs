//! Compiles the protocol. `protox` reads it, so no `protoc` is needed on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/pegaflow.proto");
    let files = protox::compile(["pegaflow.proto"], ["proto"])?;
    // `bytes` fields share the receive buffer instead of copying out of it.
    tonic_prost_build::configure().bytes(".").emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
