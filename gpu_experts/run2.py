import multiprocessing as mp
import time
import traceback

import torch

import run1
from halo_tensor import ops
from halo_tensor.kernels.experts import quantizers as eq
from halo_tensor.recipe import INT8, Rotation

BF,P,SH,bench,routing,use=torch.bfloat16,run1.P,run1.SH,run1.bench,run1.routing,run1.use
dev='cuda'
R_,C_=eq.Rows,eq.Columns
def clear():
    for f in vars(eq).values():
        if hasattr(f,"cache_clear"): f.cache_clear()
def variants(name):
    f,d=SH[name][3],SH[name][2]
    np2=lambda n: 1<<(n-1).bit_length()
    wd,wf=np2(d),np2(f)
    gr=[R_(wd,max(8192//wd,1),4,8),R_(wd,max(4096//wd,1),4,4),R_(wd,max(4096//wd,1),1,4),R_(wd,max(8192//wd,1),4,4),R_(wd,1,4,4),R_(wd,1,1,4),R_(wd,1,8,8)]
    gd=[(max(e//wf,1),w) for e,w in ((4096,4),(8192,8),(2048,4),(4096,8),(8192,4),(4096,16),(4096,32)) if w<=max(e,wf)//128]
    if name=="qwen": gg=[R_(1024,4,4,8),R_(1024,2,4,4),R_(1024,4,4,4),R_(1024,1,4,4),R_(1024,2,1,4),R_(1024,2,4,8),R_(1024,1,16,2),R_(256,8,4,4)]
    elif name=="oss": gg=[R_(4096,1,4,8),R_(4096,1,4,16),R_(4096,1,1,16),R_(2048,1,4,8),R_(1024,1,4,4),R_(1024,2,4,8),R_(512,2,4,4),R_(4096,1,4,32)]
    else: gg=[R_(4096,1,4,8),R_(4096,1,4,16),R_(2048,1,4,8),R_(16384,1,4,32),R_(16384,1,1,32),R_(1024,1,4,4),R_(2048,1,1,8),R_(1024,2,4,8)]
    col=[C_(64,64,4,2),C_(64,64,4,3),C_(128,64,8,2),C_(64,128,8,2),C_(32,64,4,3),C_(128,64,4,1),C_(64,64,8,2),C_(128,128,8,1)]
    gcol=[C_(32,64,4,1),C_(32,64,4,2),C_(64,64,8,1),C_(64,64,8,2),C_(32,128,8,1),C_(16,64,4,2),C_(32,64,8,1),C_(64,64,16,1)]
    return gr,gd,gg,col,gcol
def sweep(name,T=8192,only=None):
    E,k,d,f,gate,edge=SH[name]; rt=routing(E,k,T); R=T*k; ti,st=rt.tiles,rt.starts; rot=Rotation(edge)
    x=torch.randn(T,d,device=dev,dtype=BF); h=torch.randn(R,2*f,device=dev,dtype=BF); g=torch.randn(R,f,device=dev,dtype=BF); s=torch.rand(R,device=dev); w=torch.rand(R,device=dev); fd=torch.rand(E,d,device=dev); ff=torch.rand(E,2*f,device=dev)
    gr,gd,gg,col,gcol=variants(name)
    jobs=[("group_rows","group_rows",gr,lambda: ops.quantize_groups(x,rt.source,fd,ti,INT8)),("gated_rows","gated_rows",gd,lambda: ops.quantize_gated(h,gate,rot,INT8,None)),
          ("gated_grad_rows","gated_grad_rows",gg,lambda: ops.quantize_gated_grad(h,g,w,gate,ff,ti,INT8)),
          ("group_columns","COLUMNS",col,lambda: ops.quantize_groups_t(x,rt.source,w,s,ti,st,False,INT8)),("gated_grad_columns","COLUMNS_GATED",gcol,lambda: ops.quantize_gated_grad_t(h,g,w,gate,s,ti,st,False,INT8))]
    for label,attr,vs,run in jobs:
        if only and label!=only: continue
        old=getattr(eq,attr); res=[]
        for v in vs:
            try:
                setattr(eq,attr,(lambda *_,v=v: v) if callable(old) and not isinstance(old,tuple) else v); clear()
                t=bench(run,8) if T==8192 else run()
                res.append((t,tuple(v)))
            except Exception as e: res.append((9e9,str(v)+repr(e)[:80])); print(label,v,repr(e)[:300],flush=True)
        setattr(eq,attr,old); clear()
        if T==8192: P(f"{name} {label}: "+"  ".join(f"{v} {t:.3f}" for t,v in res))
def task(t):
    try: t[0](*t[1:])
    except Exception: P("FAIL",t); traceback.print_exc()
A8,A16,A4,B8,B16=(256,128,4,8,1,8),(256,128,4,8,1,16),(256,128,4,8,1,4),(128,128,3,4,2,8),(128,128,3,4,2,16)
if __name__=="__main__":
    ctx=mp.get_context("spawn")
    L=("group_rows","gated_rows","gated_grad_rows","group_columns","gated_grad_columns")
    tasks=[(run1.prods,"int8","gluon",A8),(run1.prods,"fp8","gluon",A8),(run1.prods,"int8","gluon",B8)]
    tasks+=[(sweep,n,64,l) for n in ("oss","mixtral","qwen") for l in L if not (n!="qwen" and l=="group_columns") and not (n=="mixtral" and l=="gated_grad_columns")]
    tasks+=[(run1.layer,n,64) for n in ("qwen","oss","mixtral")]
    with ctx.Pool(15) as pool: pool.map(task,tasks,chunksize=1)
    P("--- workers done")
    for n in SH: task((sweep,n))
    for n in SH: task((run1.prod_times,n,[A8,A16,A4,B8,B16]))
    for n in SH: task((run1.layer,n))
