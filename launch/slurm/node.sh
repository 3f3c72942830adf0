#!/bin/bash
# Started on each node of a job by the srun of train.sbatch: opens the node's log, sets up its environment, finds its
# address, and starts torchrun.
exec >>"$NODE_LOG-$SLURMD_NODENAME.log" 2>&1
fail() {
    echo "$SLURMD_NODENAME: $1" >&2
    scancel --signal=KILL "$SLURM_JOB_ID.$SLURM_STEP_ID" # otherwise the other nodes would wait for this one
    exit 2
}

. launch/slurm/environment.sh || fail "the environment could not be set up, see above"

# Ask the kernel for the route to another node: it names the network device and this node's address on it. The node's
# own host name cannot be used: on Debian it resolves to 127.0.1.1 on the node itself.
device=lo address=127.0.0.1
if [ "$SLURM_NNODES" -gt 1 ]; then
    other=$HEAD_ADDR
    [ "$SLURMD_NODENAME" != "$HEAD" ] || other=$NEXT_ADDR
    read -r number _ < <(getent ahostsv4 "$other" || getent ahosts "$other") || fail "$other: unknown host"
    [[ "$(ip -oneline route get "$number")" =~ dev\ ([^ ]+).*\ src\ ([^ ]+) ]] ||
        fail "$other ($number): no route to it"
    device=${BASH_REMATCH[1]} address=${BASH_REMATCH[2]}
    [ "$device" != lo ] || [ "$HEAD_ADDR" = "$NEXT_ADDR" ] ||
        fail "$other is $number, which is this node; set HEAD_ADDR to an address of $HEAD that all nodes reach"
    # If the first node answers or refuses the connection, it can be reached. A firewall may drop the connection
    # silently; then all nodes would wait for each other.
    if [ "$other" = "$HEAD_ADDR" ]; then
        answer=$(LC_ALL=C timeout 20 bash -c ": <>/dev/tcp/$number/$HEAD_PORT" 2>&1) || [[ $answer == *refused* ]] ||
            fail "$other ($number): port $HEAD_PORT cannot be reached; set HEAD_PORT= to an open port, or HEAD_ADDR="
    fi
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$device}
fi
echo "$SLURMD_NODENAME: address $address on $device, rendezvous at $HEAD_ADDR:$HEAD_PORT"

is_host=$([ "$SLURMD_NODENAME" = "$HEAD" ] && echo true || echo false)
exec python -m launch.torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$NPROC" \
    --rdzv_backend=c10d --rdzv_id="$RENDEZVOUS" --rdzv_endpoint="$HEAD_ADDR:$HEAD_PORT" --local_addr="$address" \
    --rdzv_conf="is_host=$is_host,read_timeout=300" --max_restarts="${MAX_RESTARTS:-0}" \
    --shutdown-timeout="${SAVE_SECONDS:-120}" \
    -m trainer.main "$@"
