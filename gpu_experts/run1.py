import time
import traceback

T0=time.time()
import multiprocessing as mp

import torch

from halo_tensor import ops
from halo_tensor.recipe import *
from halo_tensor.reference import experts as ref
from halo_tensor.reference import ops as rops
from halo_tensor.reference.codes import code_dtype

P=lambda *a: print(f"[{time.time()-T0:5.1f}]",*a,flush=True)
dev='cuda'
BF=torch.bfloat16
def same(name,a,b,limit):
    a,b=a.float(),b.float(); d=(a-b).abs(); bad=(d>0).float().mean().item(); rel=(d.norm()/b.norm().clamp_min(1e-30)).item()
    ok = (rel<=limit) and bool(torch.isfinite(a).all())
    P(("ok   " if ok else "FAIL "),f"{name:34} differ {bad:.2g} max {d.max().item() if d.numel() else 0:.3g} rel {rel:.2g}")
def setup(E,sizes,rest=5):
    offs=torch.tensor(sizes).cumsum(0).int().to(dev); R=int(offs[-1])+rest
    tiles,starts=ops.group_tiles(offs,R); t2,s2=ref.group_tiles(offs,R); assert torch.equal(tiles,t2) and torch.equal(starts,s2)
    used=torch.zeros(R,dtype=torch.bool,device=dev); used[:offs[-1]]=True
    cols=torch.zeros(tiles.shape[0]*128,dtype=torch.bool,device=dev); cols[:int(starts[E])*128]=True
    return offs,R,tiles,starts,used,cols
CASES={"int8":(5,[3,0,130,700,257],512,768,INT8,Gate(),Rotation(128)),"fp8":(3,[0,300,129],576,320,FP8_E4M3,Gate(1.702,1.,1.,True),Rotation(64))}
def quant(case):
    E,sizes,c,f,fmt,gate,rot=CASES[case]; torch.manual_seed(0); offs,R,tiles,starts,used,cols=setup(E,sizes); T=R//2
    x=torch.randn(T,c,device=dev).to(BF); idx=torch.randint(0,T,(R,),device=dev).int(); fold=torch.rand(E,c,device=dev)+.1; fr=torch.rand(R,device=dev)+.1; w=torch.rand(R,device=dev)
    q,s=ops.quantize_groups(x,idx,fold,tiles,fmt); q2,s2=ref.quantize_groups(x,idx,fold,tiles,fmt); same(case+" rows",q[used],q2[used],0); same(case+" row scales",s[used],s2[used],1e-7)
    a,b,m=ops.quantize_groups_t(x,idx,w,fr,tiles,starts,True,fmt); a2,b2,m2=ref.quantize_groups_t(x,idx,w,fr,tiles,starts,fmt); same(case+" columns",a[:,cols],a2[:,cols],1e-3); same(case+" col scales",b,b2,1e-6); same(case+" sums",m,m2,1e-5)
    g,gs=ops.gather_codes(q2,s2,idx%R); same(case+" gather",g,q2[(idx%R).long()],0); same(case+" turn",ops.turn_codes(q2,idx%R,tiles)[:,cols],ref.turn_codes(q2,idx%R,tiles)[:,cols],0)
    pos=torch.randint(0,R,(T,3),device=dev).int(); y=torch.randn(R,c,device=dev).to(BF); same(case+" combine",ops.combine(y,pos,BF),ref.combine(y,pos,BF),1e-6)
    W=torch.randint(-100,100,(E,c,2*f),device=dev).to(torch.int8); same(case+" turn_stack",ops.turn_stack(W),W.transpose(1,2),0)
def gated(case):
    E,sizes,c,f,fmt,gate,rot=CASES[case]; torch.manual_seed(0); offs,R,tiles,starts,used,cols=setup(E,sizes)
    h=torch.randn(R,2*f,device=dev).to(BF); gr=torch.randn(R,f,device=dev).to(BF); w=torch.rand(R,device=dev); fold=torch.rand(E,2*f,device=dev)+.1; fr=torch.rand(R,device=dev)+.1
    for gn in (None,2.0**torch.randint(-2,3,(f,),device=dev).float()):
        q,s=ops.quantize_gated(h,gate,rot,fmt,gn); q2,s2=rops.rotate_quantize(ref.activate(h,gate),None,rot,fmt,"row",gain=gn); same(case+" gated",q,q2,4e-3); same(case+" gated scales",s,s2,2e-3)
    q,s,d=ops.quantize_gated_grad(h,gr,w,gate,fold,tiles,fmt); gh,d2=ref.activate_backward(h,gr,w,gate); q2,s2=ref.quantize_groups(gh,None,fold,tiles,fmt)
    same(case+" ggrad",q[used],q2[used],4e-3); same(case+" ggrad scales",s[used],s2[used],1e-5); same(case+" dots",d[used],d2[used],1e-5)
    a,b,m=ops.quantize_gated_grad_t(h,gr,w,gate,fr,tiles,starts,True,fmt); a2,b2,m2=ref.quantize_groups_t(gh,None,None,fr,tiles,starts,fmt); same(case+" ggrad_t",a[:,cols],a2[:,cols],4e-3); same(case+" ggrad_t scales",b,b2,1e-5); same(case+" ggrad_t sums",m,m2,1e-4)
def codes(fmt,*shape): return torch.randint(-127,128,shape,device=dev).to(torch.int8) if fmt.uniform else torch.randn(*shape,device=dev).to(code_dtype(fmt))
def prods(case,backend,conf=None):
    use(backend,conf)
    E,sizes,c,f,fmt,gate,rot=CASES[case]; torch.manual_seed(0); offs,R,tiles,starts,used,cols=setup(E,sizes); n=2*f
    a,b,s,bs=codes(fmt,R,c),codes(fmt,E,n,c),torch.rand(R,device=dev),torch.rand(E,n,device=dev); bias=torch.randn(E,n,device=dev).to(BF)*1e3; w=torch.rand(R,device=dev); gn=torch.rand(n,device=dev)
    lim=3e-3 if fmt.uniform else 4e-3
    for nm,ar in {"out":(bs,None,None,None,None),"out bias weight":(bs,bias,w,None,None),"gin":(None,None,None,rot,None),"gin gain":(None,None,None,rot,gn)}.items():
        y=ops.grouped_mm(a,b,tiles,starts,s,*ar[:4],BF,ar[4]); y2=ref.grouped_mm(a,b,tiles,s,*ar[:4],torch.float32,ar[4]); same(f"{case} {backend} {conf} {nm}",y,y2,5e-3); assert (y[~used]==0).all()
    et=ref.turn_codes(codes(fmt,R,c),None,tiles); xt=ref.turn_codes(codes(fmt,R,n),None,tiles); es=torch.rand(E,c,device=dev)
    for nm,r,gg in (("gw",rot,None),("gw gain",rot,gn),("gw plain",None,None)):
        G=ops.grouped_grad(et,xt,starts,es,r,BF,gg); G2=ref.grouped_grad(et,xt,starts,es,r,torch.float32,gg); same(f"{case} {backend} {conf} {nm}",G,G2,5e-3)
        assert all((G[e]==0).all() for e,k in enumerate(sizes) if k==0)
def use(backend,conf=None,tconf=None):
    from halo_tensor.kernels.experts import products as ep
    from halo_tensor.kernels.experts import sm90 as es
    if not hasattr(ep,"ALL"): ep.ALL=ep.BACKENDS
    ep.BACKENDS=ep.ALL if backend=="gluon" else ep.ALL[1:]
    if conf: es.ROWS=es.Config(*conf)
    if tconf or conf: es.TOKENS=es.Config(*(tconf or conf))
    ep.plan.cache_clear()
def task(t):
    try: globals()[t[0]](*t[1:])
    except Exception: P("FAIL",t); traceback.print_exc()
A,B,C,D=(256,128,4,8,1,8),(128,128,3,4,2,8),(128,128,2,4,2,8),(128,64,4,4,2,8)
SH={"qwen":(128,8,2048,768,Gate(),128),"oss":(32,4,2880,2880,Gate(1.702,7.0,1.0,True),64),"mixtral":(8,2,4096,14336,Gate(),128)}
def bench(f,n=8):
    for _ in range(2): f()
    torch.cuda.synchronize(); ev=[(torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for a,b in ev: a.record(); f(); b.record()
    torch.cuda.synchronize(); return sorted(a.elapsed_time(b) for a,b in ev)[n//2]
def routing(E,k,T=8192):
    from halo_tensor.products.experts import route
    return route(torch.rand(T,E,device=dev).topk(k,1).indices,E)
def compile_only(name,conf):
    use("gluon",conf); prod_times(name,[conf],quiet=True)
def prod_times(name,confs,quiet=False):
    E,k,d,f,gate,edge=SH[name]; T=8192 if not quiet else 64; rt=routing(E,k,T); R=T*k; rot=Rotation(edge); ti,st=rt.tiles,rt.starts; K=ti.shape[0]*128
    if quiet and E>8: pass
    mk=lambda *s: torch.randint(-127,128,s,device=dev,dtype=torch.int8)
    for nm,(n,kk) in {"gate_up":(2*f,d),"down":(d,f)}.items():
        fl=2*R*n*kk*1e-12
        a,w,wt,e=mk(R,kk),mk(E,n,kk),mk(E,kk,n),mk(R,n); s=torch.rand(R,device=dev); bs=torch.rand(E,n,device=dev); es=torch.rand(E,n,device=dev)
        et,xt=mk(n,K),mk(kk,K)
        if not quiet:
            dn=bench(lambda: ops.scaled_mm(a,w[0],s,bs[0],None,None,None,[R,n],BF)); ab,wb=a.to(BF),w.to(BF).transpose(1,2)
            g=bench(lambda: torch._grouped_mm(ab,wb,offs=rt.offs,out_dtype=BF)); eb=e.to(BF)
            g2=bench(lambda: torch._grouped_mm(eb.t(),ab,offs=rt.offs,out_dtype=BF))
            P(f"{name} {nm}: dense int8 {dn:.3f} ms {fl/dn*1e3:.0f} T | bf16 grouped {g:.3f} {fl/g*1e3:.0f} | bf16 gw {g2:.3f} {fl/g2*1e3:.0f}"); del ab,wb,eb
        for conf in confs:
            try:
                use("gluon" if conf else "triton",conf)
                o=bench(lambda: ops.grouped_mm(a,w,ti,st,s,bs,None,None,None,BF)); gi=bench(lambda: ops.grouped_mm(e,wt,ti,st,s,None,None,None,rot,BF)); gw=bench(lambda: ops.grouped_grad(et,xt,st,es,rot,BF))
                if not quiet: P(f"   {conf!s:24} out {o:.3f} {fl/o*1e3:.0f} | gin {gi:.3f} {fl/gi*1e3:.0f} | gw {gw:.3f} {fl/gw*1e3:.0f}")
            except Exception: traceback.print_exc()
def layer(name,T=8192):
    from halo_tensor import HaloWeight
    from halo_tensor.products.experts import experts
    use("gluon",A)
    E,k,d,f,gate,edge=SH[name]; x=torch.randn(T,d,device=dev,dtype=BF).requires_grad_(); idx=torch.rand(T,E,device=dev).topk(k,1).indices; w=torch.rand(T,k,device=dev).requires_grad_()
    r=halo(1,INT8); mk=lambda *s: torch.nn.Parameter(HaloWeight.from_hp(torch.randn(*s,device=dev,dtype=BF)*.02,r))
    gu,dn=mk(E,2*f,d),mk(E,d,f); g=torch.randn(T,d,device=dev,dtype=BF)
    def step():
        gu.grad=dn.grad=x.grad=w.grad=None
        experts(x,idx,w,gu,dn,gate).backward(g)
    if T<8192: return step()
    t=bench(step,5); P(f"layer {name} eager fwd+bwd {t:.3f} ms")
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        step(); torch.cuda.synchronize()
    rows=sorted(((e.key[:60],e.self_device_time_total/1e3,e.count) for e in p.key_averages()),key=lambda r:-r[1])[:22]
    P("  sum %.3f"%sum(r[1] for r in rows)); [print(f"     {r[1]:.3f} ms x{r[2]} {r[0]}",flush=True) for r in rows]
if __name__=="__main__":
    ctx=mp.get_context("spawn")
    tasks=[("quant","int8"),("quant","fp8"),("gated","int8"),("gated","fp8"),("prods","int8","gluon",A),("prods","fp8","gluon",A),("prods","int8","gluon",D),("prods","int8","triton"),("prods","int8","gluon",C),("compile_only","qwen",B),("layer","mixtral",64),("layer","qwen",64),("layer","oss",64)]
    with ctx.Pool(len(tasks)) as pool: pool.map(task,tasks,chunksize=1)
    P("--- workers done")
    for n in SH: task(("prod_times",n,[A,B,C,D]+([None] if n=="qwen" else [])))
    for n in SH: task(("layer",n))
